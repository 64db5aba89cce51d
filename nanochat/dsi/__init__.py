"""A differentiable search index: a model that answers a query with the id of a document, from its weights."""
