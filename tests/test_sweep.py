"""The line from end to end: two plain float64 forwards sample by sample, however it is cut, stored and resumed."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import finf_fast as ff
from finf_fast import pipeline
from finf_fast.delta import DeltaEngine
from finf_fast.loss import resolve
from finf_fast.lowrank import dense
from finf_fast.pair import PairEngine
from nets import conv_net, language_model, mlp, plain_scores

BOUNDS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]
ENGINES = pytest.mark.parametrize("engine", ["delta", "pair"])


def ups(model, batch, count=3, **settings):
    x, y = batch
    settings = {"loss": "cross_entropy", "method": "sgd", "lr": 1e-2, **settings}
    return [ff.mirror(model, (x[i : i + 2], y[i : i + 2]), **settings) for i in range(count)]


def check(scores, base, delta, bound):
    """Both within ``bound`` of the truth, whose changes must themselves stand well above it."""
    base, delta = base.numpy(), delta.numpy()
    scale = max(1, np.nanmax(base)) if bound > 1e-9 else 1
    assert np.array_equal(np.isnan(scores.base), np.isnan(base))
    assert np.nanmax(np.abs(scores.base - base)) <= bound * scale
    assert np.nanmax(np.abs(scores.delta - delta)) <= bound * scale
    assert np.nanmax(np.abs(delta)) > 100 * bound


@ENGINES
@pytest.mark.parametrize("dtype, bound", BOUNDS)
@pytest.mark.parametrize("direction", ["ascent", "descent"])
def test_an_mlp(engine, dtype, bound, direction):
    model, data = mlp()
    updates = ups(model, data, direction=direction)
    scores = ff.sweep(model, updates, data, dtype=dtype, engine=engine, batch_size=16)
    check(scores, *plain_scores(model, updates, resolve("cross_entropy"), [(data[0].double(), data[1])]), bound)
    assert scores.base.dtype == np.dtype(str(dtype).removeprefix("torch."))
    sign = 1 if direction == "ascent" else -1
    assert np.array_equal(scores.influence, sign * scores.delta)
    assert scores.influence[0][:2].min() > 0  # a query's own samples help it, whichever way the step went


@ENGINES
@pytest.mark.parametrize("dtype, bound", BOUNDS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_batch_norm_net_stepped_in_either_mode(engine, dtype, bound, mode):
    model, data = conv_net()
    updates = ups(model, data, mode=mode)
    assert bool(updates[0].buffers) == (mode == "train")
    scores = ff.sweep(model, updates, data, dtype=dtype, engine=engine, batch_size=16)
    check(scores, *plain_scores(model, updates, resolve("cross_entropy"), [(data[0].double(), data[1])]), bound)


@ENGINES
@pytest.mark.parametrize("dtype, bound", BOUNDS)
def test_a_causal_lm_with_ragged_lengths_and_ignored_tokens(engine, dtype, bound):
    model, data = language_model()
    loss = resolve("causal_lm")
    rows = [{k: v[None] for k, v in sample.items()} for sample in data]  # the truth sees no padding at all
    updates = [ff.mirror(model, rows[i], loss="causal_lm", lr=0.1) for i in (0, 4, 8)]
    scores = ff.sweep(model, updates, data, loss="causal_lm", dtype=dtype, engine=engine, batch_size=8)
    check(scores, *plain_scores(model, updates, loss, rows), bound)
    assert np.isnan(scores.base[7]) and scores.record["samples_without_target"] == 1


@pytest.mark.parametrize(("engine", "forwards"), [("pair", 1 + 3), ("delta", 1)])
def test_one_forward_for_the_base_however_many_queries(engine, forwards):
    model, data = mlp(32)
    calls = []
    updates = ups(model, data)
    count = lambda net, batch: calls.append(1) or net(batch[0]).square().sum(1)  # noqa: E731
    ff.sweep(model, updates, data, loss=count, batch_size=8, engine=engine)
    assert len(updates) == 3
    assert len(calls) == 4 * forwards + 2  # four batches, and the probe, which runs twice


def test_the_model_is_left_as_it_was_whatever_happens():
    model, data = conv_net()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def interrupted(net, batch):
        interrupted.calls += 1
        if interrupted.calls == 4:
            raise KeyboardInterrupt
        return net(batch[0]).sum(1)

    interrupted.calls = 0
    updates = ups(model, data)
    with pytest.raises(KeyboardInterrupt):
        ff.sweep(model, updates, data, loss=interrupted, batch_size=8)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype, bound", BOUNDS)
def test_a_model_that_writes_into_its_input(dtype, bound):
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 5)).double(), mlp()[1]
    before, updates = x.clone(), ups(model, (x, y))
    scores = ff.sweep(model, updates, (x, y), dtype=dtype, batch_size=16)
    assert torch.equal(x, before)  # the corpus shares the user's memory
    check(scores, *plain_scores(model, updates, resolve("cross_entropy"), [(x.clone(), y)]), bound)
    assert torch.equal(x, before)


def test_shards_join_to_the_whole(tmp_path):
    model, data = mlp(50)
    updates = ups(model, data)
    whole = ff.sweep(model, updates, data, batch_size=8)
    for i in range(3):
        ff.sweep(model, updates, data, batch_size=8, shard=(i, 3), out=tmp_path / str(i))
    joined = ff.Scores.merge([tmp_path / "2", tmp_path / "0", tmp_path / "1"])
    np.testing.assert_allclose(joined.base, whole.base, atol=1e-14)
    np.testing.assert_allclose(joined.delta, whole.delta, atol=1e-14)
    assert joined.indices.tolist() == list(range(50))


@pytest.mark.parametrize("shard", [(0,), 5, "01", (0.5, 2), ("0", "1"), (0, 2, 3)])
def test_shards_are_two_whole_numbers(shard):
    model, data = mlp(50)
    with pytest.raises(TypeError, match=r"shard: wanted two whole numbers \(i, n\), got"):
        ff.sweep(model, ups(model, data), data, shard=shard)


def test_shards_by_numpy_s_numbers():
    model, data = mlp(50)
    scores = ff.sweep(model, ups(model, data), data, shard=(np.int32(1), np.int64(3)))
    assert scores.indices.tolist() == list(range(16, 33))


@pytest.mark.parametrize("shard", [(3, 3), (-1, 2), (0, 0), (0, 51)])
def test_shards_that_make_no_sense(shard):
    model, data = mlp(50)
    with pytest.raises(ValueError, match="shard"):
        ff.sweep(model, ups(model, data), data, shard=shard)


def test_a_finished_folder_is_read_not_scored_again(tmp_path):
    model, data = mlp()
    updates = ups(model, data)
    first = ff.sweep(model, updates, data, out=tmp_path / "run", batch_size=16)
    calls = []
    again = ff.sweep(
        model, updates, data, out=tmp_path / "run", progress=lambda done, total: calls.append((done, total))
    )
    assert np.array_equal(first.delta, again.delta) and calls == [(60, 60)]


def test_an_interrupted_run_resumes_with_the_manifest_s_plan(tmp_path):
    model, data = mlp()
    updates = ups(model, data)
    whole = ff.sweep(model, updates, data, out=tmp_path / "whole", batch_size=16)

    def stop(done, total):
        if done >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ff.sweep(model, updates, data, out=tmp_path / "part", batch_size=16, progress=stop)
    assert not ff.Scores.open(tmp_path / "part", partial=True).complete
    resumed = ff.sweep(model, updates, data, out=tmp_path / "part", batch_size=4)  # the manifest's 16 holds
    for name in ("base.npy", "delta.npy", "done"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert resumed.manifest["plan"]["block"] == 16 and np.array_equal(resumed.base, whole.base)


def test_another_run_s_folder_is_refused(tmp_path):
    model, data = mlp()
    updates = ups(model, data)
    ff.sweep(model, updates, data, out=tmp_path / "run")
    with pytest.raises(ff.ManifestMismatch, match="updates"):
        ff.sweep(model, ups(model, data, lr=2e-2), data, out=tmp_path / "run")
    with pytest.raises(ff.ManifestMismatch, match="corpus"):
        ff.sweep(model, updates, (data[0] + 1, data[1]), out=tmp_path / "run")
    with pytest.raises(ff.ManifestMismatch, match="dtype"):
        ff.sweep(model, updates, data, out=tmp_path / "run", dtype=torch.float32)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(ff.ManifestMismatch, match="model"):
        ff.sweep(model, updates, data, out=tmp_path / "run")


@pytest.mark.parametrize("engine", [PairEngine, DeltaEngine])
def test_memory_running_out_halves_the_batch_and_is_remembered(tmp_path, monkeypatch, engine):
    model, data = mlp()
    updates = ups(model, data)
    whole = ff.sweep(model, updates, data, batch_size=16, engine=engine.name)
    real = engine.score

    def tight(self, batch):
        if len(batch[0]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return real(self, batch)

    monkeypatch.setattr(engine, "score", tight)
    scores = ff.sweep(model, updates, data, batch_size=16, engine=engine.name, out=tmp_path / "run")
    np.testing.assert_allclose(scores.delta, whole.delta, atol=1e-14)
    assert scores.manifest["plan"]["halvings"] == [[0, 8], [0, 4]]

    def hopeless(self, batch):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(engine, "score", hopeless)
    with pytest.raises(torch.OutOfMemoryError):
        ff.sweep(model, updates, data, batch_size=16, engine=engine.name)


def test_per_token_scores(tmp_path):
    torch.manual_seed(0)
    model, _ = language_model()
    ids = torch.randint(0, 19, (10, 7))
    updates = [ff.mirror(model, ids[:1], loss="causal_lm")]
    scores = ff.sweep(model, updates, ids, loss="causal_lm", per_token=True, batch_size=4, out=tmp_path / "run")
    assert scores.token_base.shape == (10, 7) and scores.token_delta.shape == (1, 10, 7)
    np.testing.assert_allclose(np.nanmean(scores.token_base, 1), scores.base, atol=1e-12)
    np.testing.assert_allclose(np.nanmean(scores.token_delta, 2), scores.delta, atol=1e-12)
    with pytest.raises(ValueError, match="per_token"):
        ff.sweep(model, updates, ids, loss=lambda net, batch: batch.sum(1), per_token=True)


def test_forward_inf_is_mirrors_and_sweep_in_one():
    model, (x, y) = mlp()
    scores = ff.forward_inf(model, (x, y), (x[:3], y[:3]), method="sgd", lr=1e-2, batch_size=16)
    by_hand = ff.sweep(
        model, [ff.mirror(model, (x[i : i + 1], y[i : i + 1]), lr=1e-2) for i in range(3)], (x, y), batch_size=16
    )
    assert np.array_equal(scores.delta, by_hand.delta)
    grouped = ff.forward_inf(model, (x, y), (x[:3], y[:3]), groups={"pair": [0, 1], "one": [2]}, lr=1e-2)
    assert grouped.names == ("pair", "one") and grouped.delta.shape == (2, 60)
    np.testing.assert_allclose(grouped.delta[1], scores.delta[2], atol=1e-12)
    assert scores.top(0, 1).indices[0] in range(60)


@pytest.mark.parametrize("engine", ["delta", "pair", "dot"])
def test_a_compiled_model_runs_as_it_was_written(engine):
    """No step and no engine has anything compiled: this compiler fails."""

    def compiler(graph, inputs):
        raise AssertionError("a model was compiled")

    model, (x, y) = mlp()
    compiled = torch.compile(model, backend=compiler)
    parts = torch.nn.Sequential(torch.compile(model, backend=compiler))
    methods = copy.deepcopy(model)
    methods.forward = torch.compile(methods.forward, backend=compiler)
    wanted = ff.forward_inf(model, (x, y), (x[:3], y[:3]), lr=1e-2, engine=engine)
    for given in (compiled, parts, methods):
        found = ff.forward_inf(given, (x, y), (x[:3], y[:3]), lr=1e-2, engine=engine)
        assert np.array_equal(found.delta, wanted.delta) and np.array_equal(found.base, wanted.base)


def test_a_scripted_model_is_scored_by_pairs():
    _, (x, y) = mlp()
    plain = nn.Sequential(nn.Linear(12, 7), nn.GELU(), nn.Linear(7, 5)).double()
    script = torch.jit.script(plain)
    for given, same in ((script, plain), (nn.Sequential(script), nn.Sequential(plain))):
        updates = [ff.mirror(given, (x[i : i + 1], y[i : i + 1]), lr=1e-2) for i in range(2)]
        scores = ff.sweep(given, updates, (x, y))
        base, delta = plain_scores(same, updates, resolve("cross_entropy"), [(x, y)])
        np.testing.assert_allclose(scores.base, base, atol=1e-12)
        np.testing.assert_allclose(scores.delta, delta, atol=1e-12)


def test_files_give_what_arrays_give(tmp_path):
    model, (x, y) = mlp()
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", y.numpy())
    updates = ups(model, (x, y))
    from_files = ff.sweep(model, updates, ff.open_corpus(tmp_path / "x.npy", labels=tmp_path / "y.npy"), batch_size=16)
    assert np.array_equal(from_files.delta, ff.sweep(model, updates, (x, y), batch_size=16).delta)


def test_half_precision_models_run_in_the_precision_that_suits_them_and_say_so():
    model, (x, y) = mlp()
    half, data = model.bfloat16(), (x.bfloat16(), y)
    updates = ups(half, data)
    true = plain_scores(half, updates, resolve("cross_entropy"), [(x.bfloat16().double(), y)])
    for how, dtype, tolerance in (({}, "bfloat16", 1e-2), ({"engine": "pair"}, "float32", 1e-3)):
        scores = ff.sweep(half, updates, data, **how)
        assert scores.base.dtype == scores.delta.dtype == np.float32 and scores.record["dtype"] == dtype
        for found, wanted in zip((scores.base, scores.delta), true, strict=True):
            assert np.linalg.norm(found - wanted.numpy()) <= tolerance * np.linalg.norm(wanted)
    kinked = torch.nn.Sequential(model, torch.nn.ReLU())
    scores = ff.sweep(kinked, ups(kinked, data), data)
    assert scores.record["dtype"] == "float32" and "relu" in scores.plan
    asked = ff.sweep(kinked, ups(kinked, data), data, dtype=torch.bfloat16)
    assert "bfloat16 (as asked, though relu in bfloat16 may flip masks)" in asked.plan
    assert "flip" not in ff.sweep(half, updates, data, dtype=torch.bfloat16).plan


def test_the_manifest_tells_what_was_done():
    model, data = mlp()
    scores = ff.sweep(model, ups(model, data), data)
    identity = json.loads(json.dumps(scores.manifest))["identity"]
    assert identity["versions"]["torch"] == torch.__version__
    assert identity["settings"]["loss"] == "cross_entropy" and identity["settings"]["engine"] == "delta"
    assert len(identity["fingerprints"]["updates"]) == 3
    assert scores.plan.startswith("delta: every change carried, float64 (the model's own); batch of ")


def nan_at(index):
    model, (x, y) = mlp()
    x = x.clone()
    x[index] = float("nan")
    return model, (x, y)


def test_a_nan_loss_names_the_sample_and_keeps_what_was_scored(tmp_path):
    model, data = nan_at(37)
    updates = ups(model, data)
    with pytest.raises(ff.NonFiniteLoss, match="sample 37.*loss before the step is nan"):
        ff.sweep(model, updates, data, batch_size=8, out=tmp_path / "run")
    partial = ff.Scores.open(tmp_path / "run", partial=True)
    assert np.isfinite(partial.base[:32]).all() and np.isnan(partial.base[32:]).all()
    kept = ff.sweep(model, updates, data, batch_size=8, nonfinite="keep")
    assert np.isnan(kept.base[37]) and np.isfinite(np.delete(kept.base, 37)).all()


def test_a_step_that_explodes_names_the_query():
    model, data = mlp()
    updates = ups(model, data)
    broken = ff.Update({n: dense(t) * float("inf") for n, t in updates[1].params.items()})
    with pytest.raises(ff.NonFiniteLoss, match="sample 0.*query 1"):
        ff.sweep(model, [updates[0], broken], data)


def test_a_label_out_of_range_names_the_sample(tmp_path):
    model, (x, y) = mlp()
    updates, y = ups(model, (x, y)), y.clone()
    y[41] = 5
    with pytest.raises(ff.BadSample, match=r"sample 41 .*label wanted in \[0, 5\).*got 5"):
        ff.sweep(model, updates, (x, y), batch_size=8, out=tmp_path / "run")
    assert not np.isfinite(ff.Scores.open(tmp_path / "run", partial=True).base[40:]).any()


def test_a_wrong_vocabulary_names_the_file_and_place(tmp_path):
    model, _ = language_model()
    tokens = np.random.default_rng(0).integers(0, 19, 100).astype(np.uint16)
    updates = [ff.mirror(model, torch.from_numpy(tokens[:10].astype(np.int64))[None], loss="causal_lm")]
    tokens[83] = 300
    tokens.tofile(tmp_path / "train.bin")
    with pytest.raises(ff.BadSample, match=r"sample 8 \(.*train.bin.*byte 160.*token id wanted in \[0, 19\), got 300"):
        ff.sweep(model, updates, ff.open_corpus(tmp_path / "train.bin", window=10), loss="causal_lm")


def test_a_bad_first_sample_is_named_too():
    model, (x, y) = mlp()
    updates, y = ups(model, (x, y)), y.clone()
    y[0] = 77
    with pytest.raises(ff.BadSample, match="sample 0 "):
        ff.sweep(model, updates, (x, y))


class NoParameters(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"updates": []}, ValueError, "updates: wanted at least one.*Q = 0"),
        ({"updates": ["x"]}, TypeError, "updates: wanted finf_fast.Update"),
        ({"updates": [ff.Update({"nowhere": torch.zeros(1)})]}, ValueError, "no parameter 'nowhere'"),
        ({"updates": [ff.Update({"0.bias": torch.zeros(3)})]}, ValueError, "wanted shape"),
        ({"model": NoParameters()}, ValueError, "model: wanted at least one parameter"),
        ({"model": nn.Linear(6, 3, device="meta")}, ValueError, "model: wanted parameters with values"),
        ({"model": "x"}, TypeError, "model: wanted a torch.nn.Module"),
        ({"corpus": (torch.zeros(0, 12), torch.zeros(0).long())}, ValueError, "empty"),
        ({"loss": "nope"}, ValueError, "loss: wanted one of"),
        ({"engine": "warp"}, ValueError, "engine"),
        ({"nonfinite": "hide"}, ValueError, "nonfinite"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"dtype": torch.float16}, ValueError, "dtype"),
    ],
)
def test_what_a_sweep_refuses(change, error, words):
    model, data = mlp()
    given = {"model": model, "updates": ups(model, data, 1), "corpus": data, **change}
    with pytest.raises(error, match=words):
        ff.sweep(given.pop("model"), given.pop("updates"), given.pop("corpus"), **given)


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path):
    model, data = mlp()
    (tmp_path / "file").write_text("x")
    calls = []
    with pytest.raises((OSError, ValueError), match="file"):
        ff.sweep(model, ups(model, data), data, out=tmp_path / "file" / "run", progress=lambda *a: calls.append(a))
    assert calls == []


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.line, self.factor = nn.Linear(12, 5), factor

    def forward(self, x):
        return self.line(x) * self.factor


def test_a_plain_attribute_is_part_of_the_model_s_identity(tmp_path):
    torch.manual_seed(0)
    model, data = Scaled(1.0).double(), mlp()[1]
    updates = ups(model, data)
    ff.sweep(model, updates, data, out=tmp_path / "run")
    model.factor = 10.0
    with pytest.raises(ff.ManifestMismatch, match="model"):
        ff.sweep(model, updates, data, out=tmp_path / "run")


def test_another_callable_of_the_same_name_is_another_loss(tmp_path):
    model, data = mlp()
    updates = ups(model, data)

    def powered(power):
        return lambda net, batch: net(batch[0]).abs().pow(power).sum(1)

    ff.sweep(model, updates, data, loss=powered(2), out=tmp_path / "run")
    ff.sweep(model, updates, data, loss=powered(2), out=tmp_path / "run")
    with pytest.raises(ff.ManifestMismatch, match="code"):
        ff.sweep(model, updates, data, loss=powered(3), out=tmp_path / "run")


def test_kept_nans_are_not_handed_to_one_who_wants_an_error(tmp_path):
    model, data = nan_at(5)
    updates = ups(model, (data[0][10:], data[1][10:]))
    ff.sweep(model, updates, data, nonfinite="keep", out=tmp_path / "run")
    with pytest.raises(ff.ManifestMismatch, match="nonfinite"):
        ff.sweep(model, updates, data, out=tmp_path / "run")


def test_dropout_left_on_is_found_out():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(12, 5)

        def forward(self, x):
            return torch.nn.functional.dropout(self.line(x), 0.5)

    torch.manual_seed(0)
    model, data = Noisy().double(), mlp()[1]
    with pytest.raises(ValueError, match="same output twice"):
        ff.sweep(model, [ff.Update({"line.bias": torch.ones(5).double()})], data)


def test_an_id_outside_an_embedding_of_the_user_s_own_names_the_sample():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 5)).double()
    ids, y = torch.randint(0, 10, (30, 3)), torch.randint(0, 5, (30,))
    updates = [ff.mirror(model, (ids[:1], y[:1]))]
    for bad in (0, 17):
        broken = ids.clone()
        broken[bad, 1] = 50
        with pytest.raises(ff.BadSample, match=f"sample {bad} .*index out of range"):
            ff.sweep(model, updates, (broken, y), batch_size=8)


def test_per_token_by_the_loss_itself_and_room_for_the_longest():
    model, data = language_model()
    update = ff.mirror(model, data[0]["input_ids"][None], loss="causal_lm")
    scores = ff.sweep(model, [update], data, loss=ff.loss.CausalLM(per_token=True), batch_size=8)
    assert scores.token_delta.shape == (1, 30, 8)  # the longest of the ragged samples
    longer = [*data * 3, {k: v.repeat(2) for k, v in data[5].items()}]
    with pytest.raises(ValueError, match="per_token: room was made for 8 tokens"):
        ff.sweep(model, [update], longer, loss="causal_lm", per_token=True)


def test_forward_inf_hands_options_to_the_method_and_refuses_the_rest():
    model, (x, y) = mlp()
    plain = ff.forward_inf(model, (x, y), (x[:2], y[:2]), method="adam", lr=1e-3)
    decayed = ff.forward_inf(model, (x, y), (x[:2], y[:2]), method="adam", lr=1e-3, options={"weight_decay": 0.5})
    assert not np.array_equal(plain.delta, decayed.delta)
    with pytest.raises(TypeError, match="colour"):
        ff.forward_inf(model, (x, y), (x[:2], y[:2]), colour="red")


def test_a_target_of_another_shape_is_refused_not_reshaped():
    model, x = nn.Conv2d(3, 3, 1).double(), torch.randn(6, 3, 4, 5).double()
    update = ff.Update({"bias": torch.ones(3).double()})
    with pytest.raises(ValueError, match="target"):
        ff.sweep(model, [update], (x, x.permute(0, 2, 3, 1).contiguous()), loss="squared_error")
    with pytest.raises(ValueError, match="target"):
        ff.sweep(model, [update], (x, torch.zeros(6, 5, 4).long()))


def test_update_between_two_models():
    before, data = conv_net()
    torch.manual_seed(7)
    after = type(before)().double()
    after.train()(torch.randn(8, 3, 6, 6).double())
    update = ff.Update.between(before, after)
    scores = ff.sweep(before, [update], data)
    check(scores, *plain_scores(before, [update], resolve("cross_entropy"), [(data[0].double(), data[1])]), 1e-12)
    loss = resolve("cross_entropy").per_sample(after.eval(), data).detach().numpy()
    np.testing.assert_allclose(scores.base + scores.delta[0], loss, atol=1e-12)
    with pytest.raises(ValueError, match="wanted shape"):
        ff.Update.between(before, {**after.state_dict(), "a.weight": torch.zeros(1)})
    with pytest.raises(TypeError, match="before"):
        ff.Update.between(before.state_dict(), after)


def test_update_between_tied_half_precision_checkpoints():
    model, _ = language_model()
    half = model.bfloat16()
    other = {k: v + 0.01 for k, v in half.state_dict().items()}
    update = ff.Update.between(half, other)
    assert "head.weight" not in update.params and update.params["embed.weight"].dtype == torch.float32
    assert torch.equal(half.embed.weight.float() + update.params["embed.weight"], other["embed.weight"].float())


def test_a_float64_sweep_of_a_float32_net_folds_its_norms_in_float64():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    data = torch.randn(10, 3, 6, 6), torch.randint(0, 5, (10,))
    updates = ups(model, data, rank=None)
    base, delta = plain_scores(model, updates, resolve("cross_entropy"), [(data[0].double(), data[1])])
    scores = ff.sweep(model, updates, data, dtype=torch.float64, engine="delta")
    assert scores.record["folded_batch_norms"] == 1
    check(scores, base, delta, 1e-12)


@pytest.mark.parametrize("engine", ["auto", "delta", "pair", "dot"])
@pytest.mark.parametrize("dtype, error", [(torch.float16, ValueError), ("bfloat16", TypeError)])
def test_a_type_that_no_engine_has_is_refused(engine, dtype, error):
    model, data = mlp()
    wanted = "dtype: wanted torch.bfloat16, torch.float32, torch.float64 or None, got"
    with pytest.raises(error, match=wanted):
        ff.sweep(model, ups(model, data), data, dtype=dtype, engine=engine)


def test_a_type_that_no_engine_has_is_refused_before_the_steps(monkeypatch):
    model, data = mlp()
    monkeypatch.setattr(pipeline, "updates_for", lambda *given: pytest.fail("steps were made"))
    with pytest.raises(TypeError, match="dtype: wanted"):
        ff.forward_inf(model, data, data, dtype="bfloat16")


class Reads(nn.Linear):
    def forward(self, x):
        return super().forward(x) * float(self.weight.detach().numpy().sum())


def test_bfloat16_of_what_cannot_be_carried_is_refused_with_the_reason():
    model, (x, y) = Reads(4, 3), (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    with pytest.raises(ValueError, match=r"dtype: torch.bfloat16 is for .* carried, and here cannot be carried \(.*\)"):
        ff.sweep(model, ups(model, (x, y)), (x, y), dtype=torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_there_is_refused_by_name():
    model, data = mlp()
    wanted = "device: wanted one this torch can reach, got cuda without CUDA"
    for call in (ff.forward_inf, ff.fit_factors):
        with pytest.raises(ValueError, match=wanted):
            call(model, data, *([data] if call is ff.forward_inf else []), device="cuda")
    with pytest.raises(ValueError, match=wanted):
        ff.mirror(model, data, device="cuda")


@pytest.mark.parametrize("engine", ["auto", "pair", "dot"])
def test_samples_of_another_width_are_refused_with_both_shapes(engine):
    model = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(6, 20), torch.randint(0, 3, (6,))
    with pytest.raises(RuntimeError, match="10.* 20x8|20x8.*10"):
        ff.sweep(model, ups(model, (x, y)), (x[:, :10], y), engine=engine)


@pytest.mark.parametrize("engine", ["delta", "pair", "dot"])
def test_autocast_around_the_call_changes_no_bit(engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 5))
    data = torch.randn(6, 3, 6, 6), torch.randint(0, 5, (6,))
    updates = ups(model, data)
    scores = ff.sweep(model, updates, data, dtype=torch.float32, engine=engine)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = ff.sweep(model, updates, data, dtype=torch.float32, engine=engine)
    assert np.array_equal(scores.base, again.base) and np.array_equal(scores.delta, again.delta)


def test_token_ids_in_lists_are_refused_by_name():
    model, data = language_model()
    with pytest.raises(TypeError, match="causal_lm wants token ids as a tensor .* return_tensors='pt'"):
        ff.forward_inf(model, data, {"input_ids": [[1, 2, 3], [4, 5, 6]]}, loss="causal_lm")
    lists = [[1, 2], [3, 4]]  # as long as there are: otherwise their lengths are seen first
    for what, batch in [
        ("token ids", {"input_ids": lists, "labels": torch.tensor(lists)}),
        ("labels", {"input_ids": torch.tensor(lists), "labels": lists}),
    ]:
        with pytest.raises(TypeError, match=f"causal_lm wants {what} as a tensor .* return_tensors='pt'"):
            ff.mirror(model, batch, loss="causal_lm", lr=1e-2)
