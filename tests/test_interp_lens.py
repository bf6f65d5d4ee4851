"""Logit lens, tuned lens and depth: exact at the end, the same as TransformerLens's, right where the truth is planted."""

import json

import pytest
import tiny
import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp import lens, tuned_lens
from stoney_rl.interp.hooked import Batch, hook_model, left_padded

ROWS = [[5, 6, 7, 8, 9, 250], [17, 30], [201, 77, 41, 11]]  # of three lengths: two are padded
ANSWER, WRONG = torch.tensor([11, 12, 13]), torch.tensor([100, 101, 42])
TARGETS = torch.stack([ANSWER, WRONG], dim=1)


@pytest.fixture(scope="module")
def models():
    """Every architecture with three layers, opened once; Gemma 2's logits are large enough for its soft cap to bend."""
    return {
        architecture: hook_model(three_layers(architecture), tiny.tokenizer(), architecture)
        for architecture in tiny.ARCHITECTURES
    }


def three_layers(architecture: str) -> torch.nn.Module:
    source = tiny.model(architecture, layers=3)
    if architecture == "gemma2":
        source.model.norm.weight.data.add_(20)
    return source


@pytest.fixture
def batch():
    return left_padded(ROWS, 0)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_last_layer_is_the_models_own_output(models, architecture, batch):
    model = models[architecture]
    reading = lens.logit_lens(model, batch, targets=TARGETS, top_k=4)
    p = model.run(batch).logits[:, -1].log_softmax(-1)
    assert torch.allclose(reading.target_log_probabilities[:, -1, 0], p.gather(-1, TARGETS), atol=1e-5)
    assert torch.allclose(reading.top_probabilities[:, -1, 0], p.exp().topk(4).values, atol=1e-6)
    assert torch.equal(reading.top_ids[:, -1, 0], p.topk(4).indices)
    assert torch.allclose(reading.entropy[:, -1, 0], -(p.exp() * p).sum(-1), atol=1e-5)
    assert not reading.kl[:, -1].any()
    assert (reading.kl[:, :-1] > 1e-5).all()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_transformer_lens_reads_the_same(models, architecture):
    """Row by row, as its lens takes no mask; on every layer and position, with the soft cap of Gemma 2."""
    from transformer_lens.tools.analysis import logit_lens

    model = models[architecture]
    for row, targets in zip(ROWS, TARGETS, strict=True):
        batch, positions = left_padded([row], 0), range(len(row))
        ours = lens.logit_lens(model, batch, positions=positions, targets=targets[None], top_k=4)
        by_target = logit_lens(
            model.bridge, batch.ids, positions=None, targets=targets.tolist(), return_type="log_probs"
        ).readout
        top = logit_lens(model.bridge, batch.ids, positions=None, top_k=4, return_type="probs").readout
        assert torch.allclose(ours.target_log_probabilities[0], by_target.values[:, 0], atol=1e-5)
        # Two logits that are one rounding apart may change places: the vectors went through in other batches.
        assert int((ours.target_ranks[0] - by_target.target_ranks[:, 0]).abs().max()) <= 1
        assert torch.allclose(ours.entropy[0], by_target.entropy[:, 0], atol=1e-5)
        assert torch.equal(ours.top_ids[0], top.top_ids[:, 0])
        assert torch.allclose(ours.top_probabilities[0], top.values[:, 0], atol=1e-6)


def test_divergence_and_rank_against_the_definition(models, batch):
    """torch's own KL, in float64, from the streams and the checkpoint's weights."""
    model = models["llama"]
    reading = lens.logit_lens(model, batch, targets=TARGETS)
    hooks = [*(f"blocks.{layer}.hook_resid_pre" for layer in range(3)), "blocks.2.hook_resid_post"]
    run = model.run(batch, read=hooks)
    streams = torch.stack([run[hook][:, -1].double() for hook in hooks], dim=1)
    normed = streams / (streams.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * model.final_norm_weight.double()
    logits = normed @ model.W_U.double()
    p = logits[:, -1:].log_softmax(-1).expand(-1, 4, -1)
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), p, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(reading.kl[..., 0].double(), expected, atol=1e-5)
    order = logits.argsort(-1, descending=True)
    for row, (answer, _) in enumerate(TARGETS.tolist()):
        ranks = [int((order[row, layer] == answer).nonzero()) for layer in range(4)]
        assert reading.target_ranks[row, :, 0, 0].tolist() == ranks


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2"])
def test_a_padded_batch_reads_what_each_row_reads_alone(models, architecture, batch, monkeypatch):
    model = models[architecture]
    monkeypatch.setattr(lens, "CHUNK", 4)  # rows and chunks end at different places
    together = lens.logit_lens(model, batch, positions=range(-6, 0), targets=TARGETS)
    for index, row in enumerate(ROWS):
        alone = lens.logit_lens(
            model, left_padded([row], 0), positions=range(-len(row), 0), targets=TARGETS[index : index + 1]
        )
        for name, field in vars(together).items():
            shown, hidden = field[index, :, -len(row) :], field[index, :, : -len(row)]
            assert torch.allclose(shown, getattr(alone, name)[0], atol=1e-5), name
            assert bool((hidden.isnan() if field.is_floating_point() else hidden == -1).all()), name
    depths = lens.settled_depth(together), lens.answer_depth(together)
    assert all(depth[1, :4].isnan().all() for depth in depths)
    assert not depths[0][1, 4:].isnan().any()


def test_without_ranks_the_rest_is_the_same(models, batch):
    with_ranks, without = (lens.logit_lens(models["llama"], batch, targets=TARGETS, ranks=on) for on in (True, False))
    assert (without.target_ranks == -1).all() and (with_ranks.target_ranks >= 0).all()
    assert all(
        torch.equal(getattr(with_ranks, name), value) for name, value in vars(without).items() if name != "target_ranks"
    )


def test_targets_may_differ_by_position(models, batch):
    model = models["llama"]
    following = torch.tensor([[[8], [9]], [[17], [30]], [[41], [11]]])
    reading = lens.logit_lens(model, batch, positions=[-2, -1], targets=following)
    for position in range(2):
        one = lens.logit_lens(model, batch, positions=[position - 2], targets=following[:, position])
        assert torch.allclose(
            reading.target_log_probabilities[:, :, position], one.target_log_probabilities[:, :, 0], atol=1e-6
        )
    assert lens.logit_lens(model, batch).target_ranks.shape == (3, 4, 1, 0)


def planted(writer: int, layers: int = 4):
    """A model that says 11 at the embedding, layer ``writer`` (from 0) turns it into 100, and the others write nothing.

    Coordinate 0 is what every token embeds, coordinate 1 what layer ``writer`` adds; 11 is read from the first, 100 from
    the second. So 100 becomes likelier than 11 with layer number ``writer`` + 1, and stays so.
    """
    model = tiny.model("llama", layers=layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(259, 32))  # untied
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[11, 0] = 1.0
        model.lm_head.weight[100, 1] = 1.0
        model.model.layers[writer].self_attn.v_proj.weight[:, 0] = 1.0
        model.model.layers[writer].self_attn.o_proj.weight[1] = 0.1  # 32 x 0.1 x sqrt(32) is far above 1
    return hook_model(model, tiny.tokenizer(), "planted")


@pytest.mark.parametrize("writer", range(4))
def test_depth_is_the_layer_where_the_answer_was_planted(writer, batch):
    targets = torch.tensor([[100, 11]] * 3)
    reading = lens.logit_lens(planted(writer), batch, targets=targets)
    assert lens.answer_depth(reading).tolist() == [[writer + 1.0]] * 3
    assert lens.settled_depth(reading).tolist() == [[writer + 1.0]] * 3
    swapped = lens.logit_lens(planted(writer), batch, targets=targets.flip(1))
    assert lens.answer_depth(swapped).isnan().all()  # it leads until the writer, and loses: never lasting


def test_depth_of_a_model_whose_later_layers_write_nothing(batch):
    source = tiny.model("llama", layers=4)
    with torch.no_grad():
        for layer in source.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    reading = lens.logit_lens(hook_model(source, tiny.tokenizer()), batch)
    assert not reading.kl[:, 1:].any()
    assert (lens.settled_depth(reading) <= 1).all()


def test_depth_counts_from_the_last_change():
    held = torch.tensor([[[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 0], [1, 1, 1, 0]]]).bool()  # [row, layer, position]
    depth = lens.first_lasting(held)
    assert depth[0, :3].tolist() == [2.0, 0.0, 2.0]
    assert depth[0, 3].isnan()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"positions": []}, "positions"),
        ({"positions": [6]}, r"positions \[6\]: give one or more of -6..5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 260}, "top_k is 260"),
        ({"targets": TARGETS[:2]}, "targets: expected"),
        ({"targets": TARGETS + 200}, "targets: expected"),
        ({"targets": torch.zeros(3, 2, 1, dtype=torch.int64)}, "targets: expected"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(models, batch, options, complaint):
    with pytest.raises(StoneyError, match=complaint) as refusal:
        lens.logit_lens(models["llama"], batch, **options)
    assert "\n" not in str(refusal.value)


def test_the_depth_of_an_answer_needs_two_targets(models, batch):
    with pytest.raises(StoneyError, match="targets"):
        lens.answer_depth(lens.logit_lens(models["llama"], batch, targets=ANSWER[:, None]))


# Tuned lens


def texts(rows: int, seed: int) -> list[Batch]:
    """Random token ids in rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 20, (rows,), generator=generator).tolist()
    sequences = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]
    return [left_padded(sequences[start : start + 32], 0) for start in range(0, rows, 32)]


@pytest.fixture(scope="module")
def rotated():
    """Two layers that write much and logits of some size: the streams before the end are far from what is read there."""
    source = tiny.model("llama", layers=2)
    with torch.no_grad():
        source.model.embed_tokens.weight.mul_(50)
        for layer in source.model.layers:
            layer.mlp.down_proj.weight.mul_(50)
            layer.mlp.up_proj.weight.mul_(10)
        source.model.norm.weight.mul_(20)
    return hook_model(source, tiny.tokenizer(), "rotated")


@pytest.fixture(scope="module")
def tuned(rotated):
    return tuned_lens.fit_tuned_lens(rotated, texts(96, 0), texts(32, 1), steps=100, tokens=1024, seed=0)


def test_tuned_lens_is_nearer_to_the_output_on_unseen_tokens_at_every_layer(tuned):
    assert tuned.fit.held_out_tokens == 128
    assert tuned.fit.tokens == 1024
    for plain, fitted in zip(tuned.fit.plain_kl, tuned.fit.tuned_kl, strict=True):
        assert fitted < 0.8 * plain, (plain, fitted)


def test_reported_divergences_are_those_the_readings_show(rotated, tuned):
    """Held-out tokens are drawn; with all of them drawn, the report is the mean of ``kl`` over all tokens."""
    held_out = texts(4, 1)
    again = tuned_lens.fit_tuned_lens(rotated, texts(32, 0), held_out, steps=0, tokens=8 * 1000)
    assert again.fit.held_out_tokens == int(held_out[0].mask.sum())
    reading = lens.logit_lens(rotated, held_out[0], positions=range(held_out[0].ids.shape[1]))
    assert again.fit.plain_kl == pytest.approx(reading.kl.nanmean((0, 2))[:-1].tolist(), rel=1e-4)


def test_the_start_is_the_logit_lens(rotated, batch):
    """No step, no change: the translators start as the identity, so what is gained is gained by the fit."""
    untouched = tuned_lens.fit_tuned_lens(rotated, texts(32, 0), texts(32, 1), steps=0, tokens=256)
    assert untouched.fit.plain_kl == untouched.fit.tuned_kl
    plain, same = (lens.logit_lens(rotated, batch, tuned=choice) for choice in (None, untouched))
    assert torch.equal(plain.kl, same.kl)


def test_readings_use_the_translators_and_leave_the_last_layer_alone(rotated, tuned):
    held_out = texts(32, 1)[0]
    positions = range(-5, 0)
    plain = lens.logit_lens(rotated, held_out, positions=positions)
    fitted = lens.logit_lens(rotated, held_out, positions=positions, tuned=tuned)
    assert torch.equal(plain.entropy[:, -1], fitted.entropy[:, -1])
    assert not fitted.kl[:, -1].any()
    assert (fitted.kl.mean((0, 2))[:-1] < plain.kl.mean((0, 2))[:-1]).all()
    assert lens.settled_depth(fitted).mean() <= lens.settled_depth(plain).mean()


def test_a_fit_over_parts_of_the_vocabulary_also_helps_over_the_whole(rotated, tuned):
    partial = tuned_lens.fit_tuned_lens(rotated, texts(96, 0), texts(32, 1), steps=100, tokens=1024, vocabulary=32)
    assert all(kl < plain for kl, plain in zip(partial.fit.tuned_kl, tuned.fit.plain_kl, strict=True))


def test_the_same_seed_gives_the_same_lens_and_another_does_not(rotated):
    fits = [
        tuned_lens.fit_tuned_lens(rotated, texts(32, 0), texts(32, 1), steps=5, tokens=256, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert torch.equal(fits[0].weight, fits[1].weight)
    assert fits[0].fit == fits[1].fit
    assert not torch.equal(fits[0].weight, fits[2].weight)


def test_fitting_leaves_the_global_generator_and_the_model_alone(rotated):
    before, state = torch.random.get_rng_state(), rotated.W_U.clone()
    tuned_lens.fit_tuned_lens(rotated, texts(32, 0), texts(32, 1), steps=2, tokens=64)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(state, rotated.W_U)
    assert all(parameter.grad is None for parameter in rotated.bridge.parameters())


def test_no_padding_among_the_tokens_that_are_drawn(rotated):
    batches = texts(40, 2)
    streams = tuned_lens._token_streams(rotated, batches, 10**6, torch.Generator().manual_seed(0))
    hook = "blocks.0.hook_resid_pre"
    expected = torch.cat([rotated.run(batch, read=[hook])[hook][batch.mask.bool()] for batch in batches])
    assert torch.equal(streams[0], expected)
    few = tuned_lens._token_streams(rotated, batches, 10, torch.Generator().manual_seed(0))
    assert few.shape == (3, 10, 32)


def test_nothing_to_fit_on_is_refused(rotated):
    for train, held_out in (([], texts(2, 0)), (texts(2, 0), [])):
        with pytest.raises(StoneyError, match="needs tokens"):
            tuned_lens.fit_tuned_lens(rotated, train, held_out)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_can_be_fit(models, architecture):
    model = models[architecture]
    fitted = tuned_lens.fit_tuned_lens(model, texts(64, 0), texts(64, 1), steps=20, tokens=800).fit
    assert all(kl < plain for kl, plain in zip(fitted.tuned_kl, fitted.plain_kl, strict=True))


def test_what_is_saved_is_what_is_loaded(rotated, tuned, tmp_path):
    tuned_lens.save_tuned_lens(tuned, tmp_path / "lens")
    loaded = tuned_lens.load_tuned_lens(tmp_path / "lens", rotated)
    assert torch.equal(loaded.weight, tuned.weight)
    assert torch.equal(loaded.bias, tuned.bias)
    assert loaded.fit == tuned.fit
    with pytest.raises(StoneyError, match="exists already"):
        tuned_lens.save_tuned_lens(tuned, tmp_path / "lens")


def test_a_lens_of_another_model_is_refused(models, tuned, tmp_path):
    tuned_lens.save_tuned_lens(tuned, tmp_path / "lens")
    with pytest.raises(StoneyError, match="fit to another model than llama"):
        tuned_lens.load_tuned_lens(tmp_path / "lens", models["llama"])


def test_a_lens_of_another_shape_cannot_be_applied(models, tuned, batch):
    with pytest.raises(StoneyError, match="another shape"):
        lens.logit_lens(models["llama"], batch, tuned=tuned)  # three layers; the lens is of two


@pytest.mark.parametrize("harm", ["missing", "cut off", "not json", "a field is gone", "no sample"])
def test_a_damaged_lens_is_refused_in_one_line(rotated, tuned, tmp_path, harm):
    tuned_lens.save_tuned_lens(tuned, tmp_path / "lens")
    translators, description = tmp_path / "lens" / tuned_lens.TRANSLATORS, tmp_path / "lens" / tuned_lens.DESCRIPTION
    if harm == "missing":
        translators.unlink()
    elif harm == "cut off":
        translators.write_bytes(translators.read_bytes()[:100])
    elif harm == "not json":
        description.write_text("{")
    elif harm == "a field is gone":
        description.write_text(json.dumps({"fit": {}}))
    else:
        description.write_text(json.dumps(json.loads(description.read_text()) | {"fingerprint": {}}))
    with pytest.raises(StoneyError, match="not a tuned lens") as refusal:
        tuned_lens.load_tuned_lens(tmp_path / "lens", rotated)
    assert "\n" not in str(refusal.value)
