"""Models of transformers as D-RAG's generator: a closed fact was never there, its gate still learns, and a prefix of
embeddings decodes as full forwards would."""

from __future__ import annotations

import copy
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from nanochat.common import UserError
from nanochat.hf_tokenizer import OrdinaryText
from nanochat.kg.hf_gates import Gates, gated_step, lay_out, make_gates, positions, weighted_attention

pytest.importorskip("transformers")
pytest.importorskip("peft")

from nanochat.hf_tokenizer import to_hf_tokenizer
from nanochat.kg.hf_generator import LoRA, load, use_fp8

WIDTH = 32
SPOILED = "<|assistant_end|> [SEP] <s></s><think>"


def make_settings(kind: str):
    from transformers import GraniteMoeHybridConfig, LlamaConfig, NemotronHConfig

    shape = {"vocab_size": 330, "hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 48, "bos_token_id": 300, "eos_token_id": 301, "pad_token_id": None}
    if kind == "llama":
        return LlamaConfig(num_hidden_layers=2, **shape)
    if kind == "granite":  # Mamba-2 and rotary positions
        mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
        moe = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 48}
        layers = ["mamba", "attention", "mamba"]
        rope = {"position_embedding_type": "rope", "attention_multiplier": 0.35}
        return GraniteMoeHybridConfig(num_hidden_layers=3, layer_types=layers, **shape, **mamba, **moe, **rope)
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16}
    moe = {"n_routed_experts": 4, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24}
    moe["num_experts_per_tok"] = 4 if kind == "smooth nemotron" else 2  # choosing experts makes the loss jump
    return NemotronHConfig(hybrid_override_pattern="M*-MEM*", head_dim=8, **shape, **mamba, **moe)


@pytest.fixture(scope="module")
def saved(small_tokenizer, tmp_path_factory):
    """The directory of a tiny model of random weights, large enough that each layer matters."""
    from transformers import AutoModelForCausalLM

    made = {}

    def get(kind: str):
        if kind not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(make_settings(kind))
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p) * 0.15)
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
            to_hf_tokenizer(small_tokenizer, 512).save_pretrained(made[kind])
        return made[kind]

    return get


@pytest.fixture(params=["nemotron", "llama", "granite"])
def generator(request, saved):
    return load(saved(request.param))


LENGTHS = [[5, 4, 7], [6, 1, 5, 2]]  # tokens of each row's facts


def make_rows(generator, lengths=LENGTHS, keep=None, seed=0):
    """embeds, fact, targets, valid of rows: two tokens, the facts, text between the second and third, a question and an
    answer. keep: the facts of each row that are written at all."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number, facts in enumerate(lengths):
        x = torch.randn(40, generator.width, generator=draw) * 0.5
        ids = torch.randint(0, 256, (40,), generator=draw)
        fact = [-1, -1]
        for f, length in enumerate(facts):
            fact += [f] * length + ([-1] if f == 1 else [])
        fact = torch.tensor(fact + [-1] * (6 + number))
        target = torch.full((len(fact),), -1)
        target[-3:] = ids[:3]
        x = x[: len(fact)]
        if keep is not None:
            there = torch.tensor([f < 0 or f in keep[number] for f in fact.tolist()])
            x, fact, target = x[there], fact[there], target[there]
        rows.append((x, fact, target))
    longest = max(len(x) for x, _, _ in rows) + 2
    embeds = torch.randn(len(rows), longest, generator.width, generator=draw)  # padding is noise
    fact = torch.full((len(rows), longest), -1)
    targets = fact.clone()
    for row, (x, f, t) in enumerate(rows):
        embeds[row, : len(x)], fact[row, : len(x)], targets[row, : len(x)] = x, f, t
    return embeds, fact, targets, torch.tensor([len(x) for x, _, _ in rows])


def losses(generator, rows, gate):
    embeds, fact, targets, valid = rows
    return generator.losses(embeds, fact, gate, targets, valid)


@torch.no_grad()
def test_losses_are_those_of_transformers(generator):
    rows = make_rows(generator)
    embeds, _, targets, valid = rows
    for row, (x, t, n) in enumerate(zip(embeds, targets, valid, strict=True)):
        logits = generator.model(inputs_embeds=x[None, :n], use_cache=False).logits[0]
        expected = F.cross_entropy(logits, t[:n], ignore_index=-1)
        assert losses(generator, rows, None)[row] == pytest.approx(expected.item(), abs=1e-5)
    embeds, fact, targets, valid = rows
    targets[0] = -1
    assert generator.losses(embeds, fact, None, targets, valid)[0] == 0
    assert generator.losses(embeds, fact, None, torch.full_like(targets, -1), valid).tolist() == [0, 0]


def test_a_gate_of_one_changes_nothing_and_a_gate_of_zero_removes_the_fact(generator):
    rows = make_rows(generator)
    with torch.no_grad():
        plain = losses(generator, rows, None)
        assert torch.allclose(losses(generator, rows, torch.ones(2, 4)), plain, atol=1e-5)
        different = 0
        for first, second in zip(
            itertools.product([0.0, 1.0], repeat=3), itertools.product([1.0, 0.0], repeat=4), strict=False
        ):
            gate = torch.tensor([[*first, 1.0], second])
            keep = [{f for f in range(4) if g[f]} for g in gate.tolist()]
            expected = losses(generator, make_rows(generator, keep=keep), None)
            assert torch.allclose(losses(generator, rows, gate), expected, atol=2e-5)
            different += int((expected - plain).abs().max() > 1e-2)
        assert different >= 6


@pytest.mark.parametrize("kind", ["smooth nemotron", "llama", "granite"])
def test_gradients_of_soft_gates_are_finite_differences(kind, saved):
    generator = load(saved(kind))
    rows = make_rows(generator)
    gate = torch.tensor([[0.3, 0.8, 0.5, 0.0], [0.6, 0.2, 0.9, 0.4]], requires_grad=True)
    (gradient,) = torch.autograd.grad(losses(generator, rows, gate).sum(), gate)
    assert gradient[0, 3] == 0  # the first row has three facts
    h = 0.02
    with torch.no_grad():
        for row, f in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]:
            step = torch.zeros(2, 4)
            step[row, f] = h
            f2, f1, b1, b2 = (losses(generator, rows, gate + n * step)[row] for n in (2, 1, -1, -2))
            slope = (8 * (f1 - b1) - (f2 - b2)) / (12 * h)
            assert gradient[row, f] == pytest.approx(slope.item(), rel=0.03, abs=3e-4)


def test_facts_that_are_closed_get_a_gradient_and_dropped_ones_cannot(generator):
    rows = make_rows(generator)
    gate = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(losses(generator, rows, gate).sum(), gate)
    assert gradient.isfinite().all()
    assert (gradient[0, [0, 2]].abs() > 1e-4).all() and (gradient[1].abs() > 1e-4).all()


def test_tokens_of_a_closed_fact_see_each_other(saved):
    generator = load(saved("llama"))
    embeds, fact, targets, valid = make_rows(generator)
    targets[:] = -1
    targets[0, 5] = 7  # the fourth token of fact 0, which is closed; in the second row there is nothing to learn
    gate = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0] * 4])
    with torch.no_grad():
        closed = generator.losses(embeds, fact, gate, targets, valid)
        assert torch.allclose(closed, generator.losses(embeds, fact, None, targets, valid), atol=1e-6)
        embeds[0, 3] += 1
        assert (generator.losses(embeds, fact, gate, targets, valid) - closed)[0].abs() > 1e-3


def test_a_model_that_loses_the_gates_is_refused(saved):
    generator = load(saved("llama"))
    generator.model.get_base_model().set_attn_implementation("sdpa")
    rows = make_rows(generator)
    losses(generator, rows, None)
    with pytest.raises(UserError, match="does not hand gates on"):
        losses(generator, rows, torch.ones(2, 4))


def test_checkpointing_gives_the_same_gradients(saved):
    for kind in ("nemotron", "llama"):
        found = []
        for checkpointing in (False, True):
            torch.manual_seed(0)  # LoRA's own
            generator = load(saved(kind), checkpointing=checkpointing)
            generator.train()
            rows = make_rows(generator)
            gate = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]], requires_grad=True)
            losses(generator, rows, gate).sum().backward()
            weights = [p.grad for p in generator.trainable_parameters() if p.grad is not None]
            found.append(torch.cat([gate.grad.flatten(), *(w.flatten() for w in weights)]))
        assert found[0].abs().max() > 0 and torch.allclose(*found, atol=1e-5)


def test_one_joint_step_changes_adapters_projector_and_scorer_alone(generator):
    rows = list(make_rows(generator))
    projector, scorer = torch.nn.Linear(6, WIDTH), torch.nn.Linear(6, 1)
    vectors = torch.randn(2, 4, 6)
    generator.train()
    base = {name: p.clone() for name, p in generator.model.named_parameters() if not p.requires_grad}
    learned = [*generator.trainable_parameters(), *projector.parameters(), *scorer.parameters()]
    before = [p.detach().clone() for p in learned]
    optimizer = torch.optim.SGD(learned, lr=0.1)
    for _ in range(2):  # LoRA's first factor gets its gradient once the second is not 0
        p = scorer(vectors)[..., 0].sigmoid()
        gate = (p > 0.5).float() + p - p.detach()
        fact = rows[1]
        starts = (fact >= 0) & (fact != F.pad(fact[:, :-1], (1, 0), value=-1))
        embeds = rows[0].clone()
        which = starts.nonzero(as_tuple=True)
        embeds[which] = projector(vectors[which[0], fact[which]])
        optimizer.zero_grad()
        losses(generator, [embeds, *rows[1:]], gate).mean().backward()
        optimizer.step()
    same = [torch.equal(p, b) for p, b in zip(learned, before, strict=True)]
    assert not any(same)
    assert all(torch.equal(p, base[name]) for name, p in generator.model.named_parameters() if name in base)
    assert not any("out_proj" in n or "lm_head" in n for n, p in generator.model.named_parameters() if p.requires_grad)


def decoded_slowly(generator, rows, max_tokens):
    """Without padding and cache, from ids that are embedded anew each time."""
    embeds, _, _, valid = rows
    made = []
    for x, n in zip(embeds, valid, strict=True):
        x, ids = x[None, :n], []
        for _ in range(max_tokens):
            i = int(generator.model(inputs_embeds=x, use_cache=False).logits[0, -1].argmax())
            if i == generator.end:
                break
            ids.append(i)
            x = torch.cat([x, generator.embed(torch.tensor([[i]]))], dim=1)
        made.append(ids)
    return made


def test_decoding_equals_full_forwards(generator):
    rows = make_rows(generator, [[5, 4, 7], [], [3]])
    embeds, fact, _, valid = rows
    with torch.no_grad():
        expected = decoded_slowly(generator, rows, 12)
        generator.train()
        assert generator.generate(embeds, fact, valid, 12) == expected
        assert generator.model.get_base_model().training
        generator.train(False)
        stop = expected[0][4]
        generator.end, generator._stops = stop, {stop}
        expected = decoded_slowly(generator, rows, 12)
        assert generator.generate(embeds, fact, valid, 12) == expected and len(expected[0]) <= 4
        assert generator.generate(embeds, fact, valid, 0) == [[], [], []]


def test_saved_adapters_come_back(saved, tmp_path):
    for kind in ("nemotron", "llama"):
        generator = load(saved(kind), lora=LoRA(rank=4, alpha=8))
        embeds, fact, _, valid = rows = make_rows(generator)
        with torch.no_grad():
            for p in generator.trainable_parameters():
                p.add_(torch.randn_like(p) * 0.2)
        generator.save(tmp_path / kind)
        again = load(tmp_path / kind)
        assert again.generate(embeds, fact, valid, 8) == generator.generate(embeds, fact, valid, 8)
        with torch.no_grad():
            assert torch.equal(losses(again, rows, None), losses(generator, rows, None))
            fresh = load(saved(kind))
            assert (losses(fresh, rows, None) - losses(again, rows, None)).abs().max() > 1e-3
        assert sum(p.numel() for p in again.trainable_parameters()) == sum(
            p.numel() for p in generator.trainable_parameters()
        )
    with pytest.raises(UserError, match="its own LoRA"):
        load(tmp_path / "llama", lora=LoRA())


def test_text_is_never_control(saved, small_tokenizer, tmp_path):
    import shutil

    directory = tmp_path / "spoiled"
    shutil.copytree(saved("llama"), directory)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<think>"])  # an added token that is no special one
    tokenizer.save_pretrained(directory)
    generator = load(directory)
    control = set(tokenizer.get_added_vocab().values())
    for text in [*small_tokenizer.special_tokens, "<think>", f"a {SPOILED} b"]:
        assert set(tokenizer.encode(text, add_special_tokens=False)) & control
        ids = generator.encode(text)
        assert not set(ids) & control and generator.decode(ids) == text
    for text in ["The old bridge  over the river.", "東京 🙂\n", ""]:
        assert generator.encode(text) == tokenizer.encode(text, add_special_tokens=False)


def test_words_of_the_vocabulary_that_spell_control_are_taken_apart(saved, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["?", "<", "s", ">", "a", "<s>"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    generator = load(saved("llama"))
    generator._text = OrdinaryText(PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>"))
    assert generator.encode("a <s> b") == [4, 1, 2, 3, 0]


def test_a_missing_package_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"peft is missing.*pip install"):
        load(tmp_path)


def test_what_cannot_be_read_is_one_line(tmp_path, saved):
    from transformers import FalconH1Config, FalconH1ForCausalLM

    with pytest.raises(UserError, match="not a causal language model"):
        load(tmp_path)
    small = {"vocab_size": 330, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8}
    other = FalconH1ForCausalLM(FalconH1Config(**small, **mamba, num_key_value_heads=2, intermediate_size=32))
    for file in saved("llama").glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="FalconH1Mixer"):
        load(tmp_path)


def test_fp8_takes_the_large_layers_and_stays_near():
    pytest.importorskip("torchao")
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings = LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_config(settings)
    rounded = copy.deepcopy(exact)
    assert use_fp8(rounded, torch.device("cpu"), emulate=True) == 7
    ids = torch.randint(0, 320, (2, 16))
    with torch.no_grad():
        difference = (rounded(ids).logits - exact(ids).logits).abs().max() / exact(ids).logits.std()
    assert 1e-4 < difference < 0.5
    with pytest.raises(UserError, match="--fp8 needs"):
        use_fp8(exact, torch.device("cpu"))


def test_adapters_learn_beside_layers_in_fp8(small_tokenizer, tmp_path):
    pytest.importorskip("torchao")
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=330, eos_token_id=301, **shape)).save_pretrained(tmp_path)
    to_hf_tokenizer(small_tokenizer, 512).save_pretrained(tmp_path)
    exact, rounded = load(tmp_path, lora=LoRA(rank=4)), load(tmp_path, lora=LoRA(rank=4), fp8_emulate=True)
    frozen = {name: p.clone() for name, p in rounded.model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(rounded.trainable_parameters(), lr=0.02)
    rows, gate = make_rows(rounded), torch.rand(2, 4, requires_grad=True)
    history = []
    for _ in range(12):
        loss = losses(rounded, rows, gate).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert 1e-5 < abs(history[0] - losses(exact, rows, gate).mean().item()) < 0.1
    assert history[-1] < 0.85 * history[0] and gate.grad.isfinite().all() and gate.grad.any()
    assert all(torch.equal(frozen[name], p) for name, p in rounded.model.named_parameters() if name in frozen)
    rounded.save(tmp_path / "saved")
    with torch.no_grad():
        again = load(tmp_path / "saved", fp8_emulate=True)
        assert torch.allclose(losses(again, rows, gate), losses(rounded, rows, gate), atol=1e-6)


def given_gates(weight: torch.Tensor) -> Gates:
    """weight (1, L, S), the same in each row; each key is a fact."""
    return Gates(weight[:, 0], weight, torch.eye(weight.shape[-1], dtype=torch.bool)[None])


def test_weighted_attention_is_the_formula_and_tells_gates_where_the_other_side_is():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    weight = torch.tensor([[[1.0, 0.0, 0.5]] * 3]).requires_grad_()
    visible = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    visible[:, 0] = True  # a row that looks at a later key, to see all weights
    out = weighted_attention(q, k, v, given_gates(weight), visible, 0.3)  # (1, 2, 2, 3, 8)

    def slow(head, i, weight):
        e = (q[0, head, i] @ k[0, head // 2].T * 0.3).exp() * visible[0, i] * weight
        return e @ v[0, head // 2] / e.sum()

    for head in range(4):
        for i in range(3):
            assert torch.allclose(out[0, head // 2, head % 2, i], slow(head, i, weight[0, i]), atol=1e-6)
    towards = torch.randn(8)
    (gradient,) = torch.autograd.grad(out[0, 0, 0, 0] @ towards, weight)
    at = weight.detach()[0, 0]
    for key, (low, high) in enumerate([(0, 1), (0, 1), (0.499, 0.501)]):
        ends = [slow(0, 0, torch.cat([at[:key], torch.tensor([end]), at[key + 1 :]])) for end in (low, high)]
        expected = (ends[1] - ends[0]) @ towards / (high - low)
        assert torch.allclose(gradient[0, 0, key], expected, rtol=1e-3, atol=1e-4)


def test_a_closed_key_of_enormous_score_neither_drowns_the_open_ones_nor_overflows():
    q = torch.ones(1, 1, 2, 1).requires_grad_()
    k, v = torch.tensor([200.0, 1.0]).view(1, 1, 2, 1), torch.tensor([5.0, 2.0]).view(1, 1, 2, 1)
    weight = torch.tensor([[[0.0, 1.0]] * 2]).requires_grad_()
    out = weighted_attention(q, k, v, given_gates(weight), torch.ones(1, 2, 2, dtype=torch.bool), 1.0)
    assert out.flatten().tolist() == [2.0, 2.0]
    out.sum().backward()
    assert q.grad.isfinite().all()
    assert torch.allclose(weight.grad[0, :, 0], torch.tensor([3.0, 3.0]))  # to 5 from 2


def test_a_gated_step_is_the_gate_times_the_step():
    torch.manual_seed(0)
    dt, bias = torch.randn(2, 5, 3) * 4, torch.randn(3)
    gate = torch.tensor([0.0, 1e-3, 0.4, 1.0, 1.0]).expand(2, 5).clone().requires_grad_()
    step = F.softplus(dt + bias)
    found = F.softplus(gated_step(dt, bias, gate) + bias)
    assert torch.allclose(found, gate[..., None] * step, rtol=1e-4, atol=2e-9)
    (gradient,) = torch.autograd.grad(found.sum(), gate)
    assert torch.allclose(gradient, step.sum(-1), rtol=1e-3)
    half = dt.bfloat16()
    assert torch.equal(gated_step(half, bias, torch.ones(2, 5)), half)


def test_fillers_repeat_what_the_convolution_would_see():
    torch.manual_seed(0)
    W = 3
    fact = torch.tensor([[-1, 0, 0, 0, 0, 1, 2, 2, -1, -1, 3, 3, 3, -1], [1, 1, 0, 0, 0, -1, -1] + [-1] * 7])
    gate = torch.rand(2, 4)
    layout = lay_out(fact, W)
    gates = make_gates(layout, gate)
    x = torch.randn(2, fact.shape[1])
    spread = layout.spread(x[..., None])[..., 0]
    rows, places, index = gates.fillers
    filled = spread.index_put((rows, places), (gates.refill @ spread[..., None])[rows, index, 0])
    for row in range(2):
        window, expected = [0.0] * W, []  # what the next token sees; tokens and fillers as they should be
        for f, run in itertools.groupby(range(fact.shape[1]), key=lambda t: int(fact[row, t])):
            before = list(window)
            for t in run:
                expected.append(float(x[row, t]))
                window = [*window[1:], float(x[row, t])]
            if f >= 0:
                g = float(gate[row, f])
                window = [g * a + (1 - g) * b for a, b in zip(window, before, strict=True)]
                expected += window
        assert torch.allclose(filled[row, : len(expected)], torch.tensor(expected), atol=1e-5)
    assert torch.equal(layout.filler.sum(1), torch.tensor([4 * W, 2 * W]))


def test_positions_count_the_tokens_that_are_there():
    fact = torch.tensor([[-1, 0, 0, 1, 1, 1, -1, -1]])
    layout = lay_out(fact, 0)
    gates = make_gates(layout, torch.tensor([[0.0, 1.0]]))
    assert positions(layout, gates.token).tolist() == [[0, 1, 2, 1, 2, 3, 4, 5]]
    layout = lay_out(fact, 2)
    gates = make_gates(layout, torch.tensor([[1.0, 0.0]]))
    found = layout.place.new_tensor(positions(layout, gates.token).tolist()).gather(1, layout.place)
    assert found.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4]]
