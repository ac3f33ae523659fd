"""The language model against Transformers' `NemotronHForCausalLM`, and packs against their samples alone.

Shape legend: S tokens in a pack, V vocabulary rows.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nemovl_train.config.schema import LanguageConfig
from nemovl_train.model.backend import TORCH
from nemovl_train.model.init import init_weights
from nemovl_train.model.language import build_language_model
from nemovl_train.model.loss import IGNORE, token_loss
from nemovl_train.model.packing import PackParams

CONFIG = LanguageConfig(
    hidden_size=64,
    hybrid_pattern="M-M*-M-",
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=16,
    ffn_hidden_size=96,
    mamba_num_heads=8,
    mamba_head_dim=16,
    mamba_state_dim=16,
    mamba_num_groups=4,
    chunk_size=32,
    vocab_size=272,
    base_vocab_size=256,
)
LENGTHS = (7, 33, 61, 1)


def make_model(layout, config=CONFIG, **options):
    """Weights far from their defaults, so that a skipped norm, D or bias shows."""
    model = build_language_model(config, layout, params_dtype=torch.float32, backend=TORCH, **options)
    init_weights(model, seed=7, std=0.1, tp_size=layout.tp, tp_rank=layout.tp_rank)
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".D", "dt_bias")):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def pack_of(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]
    return PackParams.from_boundaries(torch.cat([ends, ends[-1:]]), ids, max(lengths))


def tokens(length, seed=0):
    return torch.randint(0, CONFIG.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def relative(ours, theirs):
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def native_model(model, config=CONFIG):
    """Transformers' class with our weights, copied name by name."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    native = NemotronHForCausalLM(
        NemotronHConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            hybrid_override_pattern=config.hybrid_pattern,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_query_groups,
            head_dim=config.head_dim,
            intermediate_size=config.ffn_hidden_size,
            mamba_num_heads=config.mamba_num_heads,
            mamba_head_dim=config.mamba_head_dim,
            ssm_state_size=config.mamba_state_dim,
            n_groups=config.mamba_num_groups,
            conv_kernel=config.conv_kernel,
            chunk_size=config.chunk_size,
            layer_norm_epsilon=config.norm_eps,
            attn_implementation="eager",
        )
    )
    for layer in native.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            # Trap: Transformers clamps dt from below at `time_step_min`; the released code and megatron-core do not.
            layer.mixer.time_step_limit = (0.0, float("inf"))
    names = native_names(model)
    assert set(native.state_dict()) == set(names)
    native.load_state_dict({name: tensor for name, (tensor, _) in names.items()})
    return native.train()


def native_names(model, of=lambda parameter: parameter.detach()):
    """Their name -> (our tensor, whether it is a piece of the fused query, key, value projection)."""
    table = {"embedding.word_embeddings.weight": "model.embeddings.weight", "output_layer.weight": "lm_head.weight"}
    table["decoder.final_norm.weight"] = "model.norm_f.weight"
    out = {}
    for name, parameter in model.named_parameters():
        tensor = of(parameter)
        theirs = table.get(name) or name.replace("decoder.layers.", "model.layers.")
        for old, new in (
            (".input_layernorm.", ".norm."),
            (".pre_mlp_layernorm.", ".norm."),
            (".mlp.linear_fc1.", ".mixer.up_proj."),
            (".mlp.linear_fc2.", ".mixer.down_proj."),
            (".self_attention.linear_proj.", ".mixer.o_proj."),
            (".conv1d_", ".conv1d."),
        ):
            theirs = theirs.replace(old, new)
        if theirs.endswith("self_attention.linear_qkv.weight"):
            # Ours interleaves by group: the group's queries, its key, its value.
            groups, per_group = CONFIG.num_query_groups, CONFIG.num_attention_heads // CONFIG.num_query_groups
            q, k, v = tensor.view(groups, per_group + 2, CONFIG.head_dim, -1).split([per_group, 1, 1], dim=1)
            for key, part in zip(("q_proj", "k_proj", "v_proj"), (q, k, v), strict=True):
                piece = theirs.replace("self_attention.linear_qkv", f"mixer.{key}")
                out[piece] = (part.reshape(-1, CONFIG.hidden_size), True)
        else:
            out[theirs] = (tensor, False)
    return out


def test_logits_and_gradients_equal_transformers(layout):
    model = make_model(layout)
    native = native_model(model)
    ids = tokens(102)
    weight = torch.randn(102, CONFIG.vocab_size, generator=torch.Generator().manual_seed(1))
    ours = model(ids, pack_of([102]))
    theirs = native(input_ids=ids[None], use_cache=False).logits[0]
    assert relative(ours, theirs) <= 1e-4
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    gradients = native_names(model, of=lambda parameter: parameter.grad)
    for name, parameter in native.named_parameters():
        assert relative(gradients[name][0], parameter.grad) <= 1e-4, name


def test_loss_equals_transformers(layout):
    model = make_model(layout)
    native = native_model(model)
    ids = tokens(45)
    labels = torch.cat([ids[1:], torch.tensor([IGNORE])])
    theirs = F.cross_entropy(native(input_ids=ids[None], use_cache=False).logits[0], labels, reduction="none")
    torch.testing.assert_close(model(ids, pack_of([45]), labels), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "position", "activation"), [("M-M*-M-", "none", "squared_relu"), ("*-*-", "rope", "swiglu")]
)
def test_packed_equals_alone(layout, pattern, position, activation):
    config = replace(CONFIG, hybrid_pattern=pattern, position=position, activation=activation)
    model = make_model(layout, config)
    samples = [tokens(n, seed=n) for n in LENGTHS]
    weights = [torch.randn(n, config.vocab_size, generator=torch.Generator().manual_seed(n)) for n in LENGTHS]

    def gradients(run):
        model.zero_grad()
        run()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    packed_logits = model(torch.cat(samples), pack_of(LENGTHS))
    packed = gradients(lambda: (packed_logits * torch.cat(weights)).sum().backward())
    alone_logits = [model(s, pack_of([len(s)])) for s in samples]
    alone = gradients(lambda: sum((o * w).sum() for o, w in zip(alone_logits, weights, strict=True)).backward())
    assert relative(packed_logits, torch.cat(alone_logits)) <= 1e-5
    for name, gradient in packed.items():
        assert relative(gradient, alone[name]) <= 1e-5, name


@torch.no_grad()
def test_samples_do_not_see_each_other(layout):
    model = make_model(layout)
    samples = [tokens(n, seed=n) for n in LENGTHS]
    before = model(torch.cat(samples), pack_of(LENGTHS)).split(LENGTHS)
    for changed in range(len(samples)):
        others = [
            tokens(n, seed=n + 100) if i == changed else s
            for i, (n, s) in enumerate(zip(LENGTHS, samples, strict=True))
        ]
        after = model(torch.cat(others), pack_of(LENGTHS)).split(LENGTHS)
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(a, b) == (i != changed)
    one_document = model(torch.cat(samples), pack_of([sum(LENGTHS)]))
    assert relative(one_document, torch.cat(before)) > 1e-2, "boundaries make no difference: the test shows nothing"


def test_loss_at_supervised_positions_only(layout):
    model = make_model(layout)
    ids = tokens(50)
    labels = torch.where(torch.arange(50) % 3 == 0, tokens(50, seed=2), IGNORE)
    logits = model(ids, pack_of([50]))
    expected = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    hidden = model.hidden_states(model.embed(ids), pack_of([50]))
    for chunk in (4, 50):
        loss = token_loss(hidden, model.output_layer, labels, chunk=chunk)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert loss.dtype == torch.float32
        assert (loss[labels == IGNORE] == 0).all()
        grads = torch.autograd.grad(loss.square().sum(), list(model.parameters()), retain_graph=True)
        assert all(relative(g, e) <= 1e-5 for g, e in zip(grads, expected_grads, strict=True))


def test_loss_without_labels_is_a_connected_zero(layout):
    model = make_model(layout)
    loss = model(tokens(20), pack_of([20]), torch.full((20,), IGNORE))
    assert loss.sum() == 0
    loss.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_log_and_d_stay_float32(layout):
    model = build_language_model(CONFIG, layout, params_dtype=torch.bfloat16, backend=TORCH)
    init_weights(model, seed=1, std=0.02)
    dtypes = {n.rpartition(".")[2]: p.dtype for n, p in model.named_parameters()}
    assert dtypes.pop("A_log") == dtypes.pop("D") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    loss = model(tokens(40), pack_of([40]), tokens(40, seed=1))
    loss.sum().backward()
    assert torch.isfinite(loss).all()


def test_a_mamba_layer_refuses_a_batch_without_boundaries(layout):
    model = make_model(layout)
    with pytest.raises(AssertionError, match="seq_idx"):
        model.decoder(hidden_states=torch.zeros(8, 1, CONFIG.hidden_size), attention_mask=None)
