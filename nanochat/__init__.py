"""nanochat: a small chat model that answers from your own documents."""
