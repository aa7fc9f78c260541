import re
import signal
import threading
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from hashret.codes import unpack
from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.models import MODELS, Member
from hashret.models.base import TrainingDefaults
from hashret.parallel import Progress
from hashret.runtime.inputs import to_input
from hashret.training import loop as training
from hashret.training.loop import LabelledPairs, Training, split, train
from hashret.training.muon import UPDATE_SCALE, Muon, orthogonalise
from hashret.training.options import TrainingOptions

LEARNED = [name for name, member in MODELS.items() if member.trainable]
DIGITS = (load_digits().images[:300, ..., None] * 15.9375).astype(np.uint8)  # (300, 8, 8, 1)
STEPS = 12  # at 5 steps an epoch of 285 images in batches of 57
BATCH = 57


def build(name: str = "denoising", seed: int = 0, **parts: Any) -> Member:
    torch.manual_seed(seed)
    return MODELS[name]((1, 8, 8), 16, **smallest(name), **parts)


def smallest(name: str) -> dict[str, Any]:
    """Return the settings of the smallest network, for members that have them."""
    return {key: value for key, value in (("network", "mlp"), ("width", 1)) if key in MODELS[name].defaults()}


def weights(member: Member) -> dict[str, list[float]]:
    return {name: tensor.tolist() for name, tensor in member.state_dict().items()}


def learn(member: Member, images: Any = DIGITS, **options: Any) -> Training:
    """`train` with these options and arguments."""
    arguments = {name: options.pop(name) for name in ("labels", "pairs", "settings", "progress") if name in options}
    return train(member, images, TrainingOptions(**({"steps": STEPS, "batch": BATCH} | options)), **arguments)


def trained_weights(name: str = "denoising", **options: Any) -> dict[str, list[float]]:
    member = build(name)
    learn(member, **options)
    return weights(member)


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report progress after each step."""
    monkeypatch.setattr(training, "REPORT_EVERY", -1.0)


@pytest.mark.parametrize("name", LEARNED)
def test_seed_and_steps_fix_the_weights(name: str) -> None:
    once = trained_weights(name)
    torch.manual_seed(99)  # nothing but the seed matters
    np.random.seed(99)  # noqa: NPY002
    assert trained_weights(name) == once
    assert trained_weights(name, seed=1) != once
    assert trained_weights(name, steps=STEPS + 1) != once
    assert once != weights(build(name))


def test_seed_and_steps_fix_the_weights_on_two_threads_too() -> None:
    torch.set_num_threads(2)
    try:
        fingerprints = {Hasher("contrastive", 32, width=8).fit(DIGITS, steps=5).fingerprint for _ in range(3)}
    finally:
        torch.set_num_threads(1)
    assert len(fingerprints) == 1


def test_training_keeps_the_callers_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3).tolist()
    torch.manual_seed(5)
    Hasher("vae", 16, network="mlp", width=1).fit(DIGITS, steps=2)
    assert torch.rand(3).tolist() == expected


def test_an_epoch_is_a_pass_over_all_images_that_are_not_held_out() -> None:
    member = build()
    done = learn(member, steps=None, epochs=2)
    assert (done.steps, done.total_steps, done.batch, done.interrupted) == (10, 10, BATCH, False)
    assert weights(member) == trained_weights(steps=10)


def test_options_override_the_training_defaults_of_a_member() -> None:
    member, other = build(), build()
    member.training_defaults = TrainingDefaults(batch=19, learning_rate=5e-3, weight_decay=0.5)
    done = train(member, DIGITS, TrainingOptions(steps=4))
    assert done.batch == 19
    assert weights(member) == trained_weights(steps=4, batch=19, learning_rate=5e-3, weight_decay=0.5)
    other.training_defaults = member.training_defaults
    train(other, DIGITS, TrainingOptions(steps=4, batch=BATCH, learning_rate=2e-3, weight_decay=0.0))
    assert weights(other) == trained_weights(steps=4, batch=BATCH, learning_rate=2e-3, weight_decay=0.0)
    assert weights(other) != trained_weights(steps=4, batch=BATCH, learning_rate=2e-3)


@pytest.mark.parametrize("capabilities", [{"avx512_bf16": True}, {"avx512_bf16": False}, {}])
def test_training_uses_bfloat16_if_the_processor_supports_it(
    capabilities: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    member, seen = build(), set()
    member.encoder.register_forward_hook(lambda _, __, features: seen.add((member.training, features.dtype)))
    learn(member)
    learning = torch.bfloat16 if capabilities.get("avx512_bf16") else torch.float32
    assert seen == {(True, learning), (False, torch.float32)}
    assert {tensor.dtype for tensor in member.parameters()} == {torch.float32}


def test_a_budget_fixes_steps_that_give_the_same_weights() -> None:
    member = build()
    done = learn(member, steps=None, budget=0.4)
    assert done.steps == done.total_steps >= 1
    assert weights(member) == trained_weights(steps=done.steps)


def test_every_image_is_seen_once_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    member = build("ae")
    loss = member.loss

    def watched(x: Tensor) -> dict[str, Tensor]:
        seen.append(x.clone())
        return loss(x)

    monkeypatch.setattr(member, "loss", watched)
    learn(member, steps=10)
    rows, held_out = split(300, 0)
    expected = sorted(DIGITS[rows].tobytes()[i : i + 64] for i in range(0, 285 * 64, 64))
    for epoch in (seen[:5], seen[5:10]):
        pixels = (torch.cat(epoch) * 255).round().to(torch.uint8).numpy().tobytes()
        assert sorted(pixels[i : i + 64] for i in range(0, len(pixels), 64)) == expected
    assert not torch.equal(seen[0], seen[5])  # in another order
    assert sum(map(len, seen[10:])) == len(held_out) == 15


def test_every_step_has_random_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    member = build("denoising")
    corrupt = member.corrupt

    def watched(x: Tensor) -> Tensor:
        seen.append(corrupt(x).tolist())
        return corrupt(x)

    monkeypatch.setattr(member, "corrupt", watched)
    learn(member, np.full((300, 8, 8, 1), 255, np.uint8), steps=7)
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.usefixtures("every_step")
def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    member = build("ae")
    path = [torch.cat([p.detach().flatten() for p in member.parameters()])]

    def watch(progress: Progress) -> None:
        path.append(torch.cat([p.detach().flatten() for p in member.parameters()]))

    learn(member, steps=60, progress=watch)
    moved = [float((b - a).norm()) for a, b in pairwise(path)]
    assert moved[0] < 0.5 * max(moved) and moved[-1] < 0.02 * max(moved)
    assert 3 <= moved.index(max(moved)) <= 20


@pytest.mark.usefixtures("every_step")
def test_stacked_pretrains_layer_by_layer_and_then_trains_all() -> None:
    member = build("stacked")
    changed, terms = [], []
    before = dict(member.state_dict())

    def watch(p: Progress) -> None:
        nonlocal before
        after = {name: tensor.clone() for name, tensor in member.state_dict().items()}
        changed.append(
            {name for name in after if after[name].is_floating_point() and (after[name] != before[name]).any()}
        )
        terms.append(list(p.terms))
        before = after

    before = {name: tensor.clone() for name, tensor in before.items()}
    learn(member, progress=watch)
    layers = [terms.index([name]) for name in ("layer 1", "layer 2", "layer 3", "reconstruction")]
    assert layers == [0, 2, 4, 6]
    numbers = [["encoder.1", "encoder.2", "decoder.6"], ["encoder.4", "encoder.5", "decoder.3"], ["encoder.7"]]
    for layer, own in enumerate(numbers):
        for step in (2 * layer, 2 * layer + 1):
            parts = {name.rpartition(".")[0] for name in changed[step]}
            assert set(own) <= parts and parts <= {*own, "decoder.4", "decoder.0", "decoder.1"}, (step, parts)
    assert {"encoder.1.weight", "decoder.6.weight"} <= changed[-1] & changed[6]


@pytest.mark.usefixtures("every_step")
def test_stacked_fine_tunes_the_last_layer_first() -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"network": "mlp", "width": 1, "fine_tune": True, "classes": 3}
    member = MODELS["stacked"]((1, 8, 8), 16, **settings)
    weights_at: dict[int, dict[str, list[float]]] = {}
    labels = np.arange(len(DIGITS)) % 4 - 1  # a quarter unknown
    learn(member, labels=labels, progress=lambda p: weights_at.setdefault(p.done, weights(member)))
    encoder = [[v for k, v in weights_at[step].items() if k.startswith("encoder.")] for step in range(1, STEPS + 1)]
    heads = [weights_at[step]["classifier.weight"] for step in range(1, STEPS + 1)]
    assert heads[0] == heads[5] != heads[6] != heads[7] != heads[8]
    assert encoder[5] == encoder[6] == encoder[7] != encoder[8]


@pytest.mark.parametrize("name", LEARNED)
def test_held_out_images_are_only_measured(name: str) -> None:
    rows, held_out = split(300, 0)
    assert sorted([*rows, *held_out]) == list(range(300)) and len(held_out) == 15
    changed = DIGITS.copy()
    changed[held_out] = 255 - changed[held_out]
    small = smallest(name)
    labels: Any = [i % 3 for i in range(len(DIGITS))] if MODELS[name].labelled else False
    hashers = [Hasher(name, 16, **small).fit(images, steps=5, labels=labels) for images in (DIGITS, changed)]
    assert hashers[0].fingerprint == hashers[1].fingerprint  # neither the weights nor the head know them
    assert hashers[0].training["held_out"] != hashers[1].training["held_out"]
    changed[rows[0]] = 255 - changed[rows[0]]
    other = Hasher(name, 16, **small).fit(changed, steps=5, labels=labels)
    assert other.fingerprint != hashers[0].fingerprint


def test_held_out_losses_are_those_of_the_trained_member() -> None:
    member = build("ae")
    done = learn(member)
    _, held_out = split(300, 0)
    x = torch.from_numpy(DIGITS[held_out]).permute(0, 3, 1, 2) / 255
    member.eval()
    assert done.held_out == pytest.approx({name: term.item() for name, term in member.loss(x).items()}, rel=1e-4)
    assert learn(build("vae")).held_out.keys() == {"reconstruction", "kl", "elbo", "log_likelihood"}
    assert learn(build("vae"), DIGITS[:30]).held_out == {}  # one image is no measure
    assert len(split(1_000_000, 0)[1]) == 5000


@pytest.mark.parametrize("name", [name for name, member in MODELS.items() if not member.labelled])
def test_labels_are_not_read_without_the_option(tmp_path: Path, name: str) -> None:
    def idx(array: Any) -> bytes:
        return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + bytes(array.tobytes())

    source = tmp_path / "digits-images-idx3-ubyte"
    source.write_bytes(idx(DIGITS[..., 0]))
    targets = load_digits().target[:300].astype(np.uint8)
    tensors = []
    for labels in (targets, np.random.default_rng(0).permutation(targets), None):
        (tmp_path / "digits-labels-idx1-ubyte").unlink(missing_ok=True)
        if labels is not None:
            (tmp_path / "digits-labels-idx1-ubyte").write_bytes(idx(labels))
        hasher = Hasher(name, 16, **smallest(name)).fit(source, steps=3)
        tensors.append((hasher.fingerprint, {key: tensor.tolist() for key, tensor in hasher._tensors().items()}))
    assert tensors[0] == tensors[1] == tensors[2]


def press_in_progress(at: int) -> Callable[[Member], dict[str, Any]]:
    """Return arguments of `learn` whose progress function raises KeyboardInterrupt after step `at`."""

    def interrupt(progress: Progress) -> None:
        if progress.done == at:
            raise KeyboardInterrupt

    return lambda member: {"progress": interrupt}


def press_in_step(at: int, action: Callable[[], None] = lambda: signal.raise_signal(signal.SIGINT)) -> Any:
    """Call `action`, by default Ctrl-C, in the middle of step `at` + 1, after it has changed batch statistics."""

    def arrange(member: Member) -> dict[str, Any]:
        loss, calls = member.loss, [0]

        def interrupted(x: Tensor) -> dict[str, Tensor]:
            terms = loss(x)
            calls[0] += 1
            if calls[0] == at + 1:
                action()
            return terms

        member.loss = interrupted  # type: ignore[method-assign]
        return {}

    return arrange


INTERRUPTIONS = {
    "in progress": (press_in_progress(5), 5),
    "in progress, in an epoch": (press_in_progress(7), 7),
    "in a step": (press_in_step(6), 7),  # the step is completed
    "in the first step": (press_in_step(0), 1),
    "in the last step": (press_in_step(STEPS - 1), STEPS),
}


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize(("arrange", "steps"), INTERRUPTIONS.values(), ids=INTERRUPTIONS)
@pytest.mark.parametrize("name", LEARNED)
def test_a_resumed_training_reaches_the_same_weights(tmp_path: Path, name: str, arrange: Any, steps: int) -> None:
    checkpoint = tmp_path / "made" / "for it" / "checkpoint"
    member = build(name)
    done = learn(member, checkpoint=checkpoint, **arrange(member))
    assert (done.interrupted, done.steps, done.total_steps) == (True, steps, STEPS)
    assert member.outputs(torch.rand(2, 1, 8, 8)).isfinite().all() and not member.training
    assert [file.name for file in checkpoint.parent.iterdir()] == ["checkpoint"]

    torch.manual_seed(99)
    member = build(name, seed=3)  # its weights are replaced
    done = learn(member, checkpoint=checkpoint, resume=True)
    assert (done.interrupted, done.steps, done.total_steps) == (False, STEPS, STEPS)
    assert weights(member) == trained_weights(name)


@pytest.mark.usefixtures("every_step")
def test_a_training_can_be_interrupted_repeatedly(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    for at in (2, 3, 9):
        member = build()
        assert learn(member, checkpoint=checkpoint, resume=at > 2, **press_in_progress(at)(member)).steps == at
    for length in ({"steps": STEPS}, {"steps": None}, {"steps": None, "budget": 60.0}):  # the same twelve steps
        member = build()
        assert learn(member, checkpoint=checkpoint, resume=True, **length).steps == STEPS
        assert weights(member) == trained_weights()


@pytest.mark.usefixtures("every_step")
def test_a_training_resumes_from_the_last_checkpoint_before_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", -1.0)

    def crash(progress: Progress) -> None:
        if progress.done == 8:
            raise RuntimeError("a crash")

    with pytest.raises(RuntimeError, match="a crash"):
        learn(build(), checkpoint=tmp_path / "checkpoint", progress=crash)
    reports: list[Progress] = []
    member = build()
    learn(member, checkpoint=tmp_path / "checkpoint", resume=True, progress=reports.append)
    assert reports[0].done == 8  # the first after the seven that were saved
    assert weights(member) == trained_weights()


@pytest.mark.usefixtures("every_step")
def test_an_interrupted_step_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    member = build()
    done = learn(member, checkpoint=tmp_path / "checkpoint", **press_in_step(6, press_twice)(member))
    assert (done.interrupted, done.steps) == (True, 6)
    assert not (tmp_path / "checkpoint").exists()  # its batch statistics are of seven steps, its weights of six

    monkeypatch.setattr(training, "SAVE_EVERY", -1.0)
    member = build()
    assert learn(member, checkpoint=tmp_path / "checkpoint", **press_in_step(6, press_twice)(member)).interrupted
    member = build()
    learn(member, checkpoint=tmp_path / "checkpoint", resume=True)
    assert weights(member) == trained_weights()


def test_the_handler_of_ctrl_c_is_restored_after_training() -> None:
    before = signal.getsignal(signal.SIGINT)
    member = build()
    learn(member, **press_in_step(2)(member))
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(HashretError):
        learn(build(), learning_rate=1e30)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_programs_own_handler_of_ctrl_c_stays() -> None:
    pressed = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        member = build()
        done = learn(member, **press_in_step(2)(member))
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [signal.SIGINT] and not done.interrupted
    assert weights(member) == trained_weights()


def test_training_in_another_thread_gives_the_same_weights() -> None:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(trained_weights()))
    thread.start()
    thread.join()
    assert result == [trained_weights()]


def test_an_interrupted_hasher_is_usable_and_records_the_interruption(tmp_path: Path) -> None:
    def press(progress: Progress) -> None:
        if progress.stage == "training":
            raise KeyboardInterrupt

    hasher = Hasher("contrastive", 16, network="mlp", width=1)
    hasher.fit(DIGITS, steps=10_000, checkpoint=tmp_path / "checkpoint", progress=press)
    assert hasher.training["interrupted"] and 0 < hasher.training["steps"] < 10_000
    assert hasher.encode(DIGITS).shape == (300, 2)
    hasher.save(tmp_path / "model")
    assert (Hasher.load(tmp_path / "model").encode(DIGITS) == hasher.encode(DIGITS)).all()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a checkpoint after the fifth of twelve steps."""
    path = tmp_path / "checkpoint"
    member = build()
    learn(member, checkpoint=path, **press_in_step(4)(member))
    return path


@pytest.mark.parametrize(
    "other",
    [
        {"name": "ae"},  # of the same shapes
        {"name": "vae"},
        {"seed": 1},
        {"batch": 50},
        {"learning_rate": 1e-3},
        {"weight_decay": 0.0},
        {"images": DIGITS[:299]},
        {"images": np.where(np.arange(300)[:, None, None, None] == 7, 255 - DIGITS, DIGITS)},
        {"settings": {"strength": 0.5}},
    ],
    ids=str,
)
def test_a_checkpoint_of_another_training_is_refused(checkpoint: Path, other: dict[str, Any]) -> None:
    other = dict(other)
    member = build(other.pop("name", "denoising"))
    before = weights(member)
    with pytest.raises(HashretError, match="is of another training: train without --resume"):
        learn(member, other.pop("images", DIGITS), checkpoint=checkpoint, resume=True, **other)
    assert weights(member) == before


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    def press(progress: Progress) -> None:
        if progress.stage == "training":
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint"
    Hasher("vae", 16, network="mlp", width=1, beta=2).fit(DIGITS, steps=10_000, checkpoint=path, progress=press)
    with pytest.raises(HashretError, match="is of another training"):
        Hasher("vae", 16, network="mlp", width=1).fit(DIGITS, steps=10_000, checkpoint=path, resume=True)


def test_resuming_with_another_number_of_steps_is_refused(checkpoint: Path) -> None:
    for length in ({"steps": 13}, {"steps": None, "epochs": 2}):
        with pytest.raises(HashretError, match="is of a training of 12 steps: resume it without steps or epochs"):
            learn(build(), checkpoint=checkpoint, resume=True, **length)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def flip_a_bit_of_the_weights(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def change_the_step(path: Path) -> None:
    data = path.read_bytes()
    assert data.count(b'"step":"5"') == 1
    path.write_bytes(data.replace(b'"step":"5"', b'"step":"6"'))


def remove_the_digest(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(re.sub(rb'"sha256":"', b'"sha257":"', data))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, garbage, flip_a_bit_of_the_weights, change_the_step, remove_the_digest, a_folder, Path.unlink],
)
def test_a_damaged_checkpoint_is_refused(checkpoint: Path, damage: Callable[[Path], None]) -> None:
    damage(checkpoint)
    member = build()
    before = weights(member)
    with pytest.raises(HashretError, match="(is damaged|there is no checkpoint).*: train without --resume"):
        learn(member, checkpoint=checkpoint, resume=True)
    assert weights(member) == before


@pytest.mark.parametrize("images", [DIGITS[:0], DIGITS[:1]], ids=["none", "one"])
def test_one_image_is_refused(images: Any) -> None:
    with pytest.raises(HashretError, match="at least two images"):
        learn(build(), images)


@pytest.mark.parametrize("name", LEARNED)
def test_two_images_are_enough(name: str) -> None:
    member = build(name)
    done = learn(member, DIGITS[:2], steps=3)
    assert done.batch == 2 and member.outputs(torch.rand(2, 1, 8, 8)).isfinite().all()


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(HashretError, match=r"loss is not finite at step \d+.*lower learning rate"):
        learn(build("ae"), learning_rate=1e30)
    with pytest.raises(HashretError, match="lower learning rate"):  # the one step spoils the weights after its loss
        Hasher("ae", 16, network="mlp", width=1).fit(DIGITS, steps=1, learning_rate=1e30)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": -5},
        {"steps": 2.5},
        {"steps": True},
        {"steps": None, "epochs": 0},
        {"steps": None, "budget": 0.0},
        {"steps": None, "budget": -1.0},
        {"steps": None, "budget": float("nan")},
        {"batch": 0},
        {"batch": 1},
        {"seed": -1},
        {"seed": 2**32},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"weight_decay": -0.5},
        {"resume": True},
    ],
    ids=str,
)
def test_impossible_values_are_refused(wrong: dict[str, Any]) -> None:
    name, value = list(wrong.items())[-1]
    with pytest.raises(ValueError, match=f"{name.replace('_', '.')}.*{value if name != 'resume' else 'checkpoint'}"):
        learn(build(), **wrong)


@pytest.mark.usefixtures("every_step")
def test_progress_names_every_term_of_the_loss() -> None:
    reports: list[Progress] = []
    done = learn(build("vae"), progress=reports.append)
    assert [(report.stage, report.done, report.total) for report in reports] == [
        ("training", i, 12) for i in range(1, 13)
    ]
    assert all(report.terms.keys() == {"reconstruction", "kl"} for report in reports)
    assert done.terms == reports[-1].terms


def labelled_pairs(n: int = 20) -> LabelledPairs:
    """Return pairs of digits, half of them labelled the same and half different."""
    return LabelledPairs(DIGITS[:n], DIGITS[n : 2 * n], np.arange(n) % 2 == 0)


def test_the_pair_loss_is_a_nat_per_wrong_bit() -> None:
    member = build("ae")
    x, a, b = (to_input(part, torch.device("cpu")) for part in (DIGITS[100:200], *labelled_pairs()[:2]))
    same = torch.from_numpy(labelled_pairs().same)
    values = member.outputs(torch.cat([x, a, b])).detach().numpy()
    bits = values > values.mean(0)
    differing = (bits[100:120] != bits[120:]).sum(1)
    expected = np.where(labelled_pairs().same, differing, np.maximum(0, 8 - differing)).mean()
    assert member.pair_loss(x, torch.stack([a, b]), same).item() == pytest.approx(expected)
    assert expected > 1


@pytest.mark.parametrize("name", LEARNED)
def test_training_with_pairs_is_reproducible(name: str) -> None:
    once = trained_weights(name, pairs=labelled_pairs())
    assert trained_weights(name, pairs=labelled_pairs()) == once != trained_weights(name)
    assert trained_weights(name, pairs=labelled_pairs()._replace(same=~labelled_pairs().same)) != once


@pytest.mark.parametrize("name", ["ae", "binary"])
def test_pairs_reduce_distances_of_same_and_increase_those_of_different_images(name: str) -> None:
    def differing_bits(**options: Any) -> tuple[float, float]:
        hasher = Hasher(name, 16, **smallest(name) | {"width": 4}).fit(DIGITS, steps=150, **options)
        a, b = (unpack(hasher.encode(side)) for side in labelled_pairs()[:2])
        return tuple((a != b).sum(1)[labelled_pairs().same == same].mean() for same in (True, False))

    pairs = [(a, b, bool(same)) for a, b, same in zip(*labelled_pairs(), strict=True)]
    (same, different), (same_before, different_before) = differing_bits(pairs=pairs), differing_bits()
    assert same < 0.6 * same_before and different >= max(6.0, different_before)


def test_a_training_resumes_only_with_the_same_pairs(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"

    def stop(progress: Progress) -> None:
        if progress.stage == "training" and progress.done >= 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "REPORT_EVERY", -1.0)
        patch.setattr(training, "SAVE_EVERY", -1.0)
        member = build()
        assert learn(member, pairs=labelled_pairs(), checkpoint=path, progress=stop).interrupted
    with pytest.raises(HashretError, match="is of another training"):
        learn(build(), checkpoint=path, resume=True)
    with pytest.raises(HashretError, match="is of another training"):
        learn(build(), pairs=labelled_pairs(10), checkpoint=path, resume=True)
    member = build()
    learn(member, pairs=labelled_pairs(), checkpoint=path, resume=True)
    assert weights(member) == trained_weights(pairs=labelled_pairs())


def test_unusable_pairs_are_refused() -> None:
    with pytest.raises(HashretError, match="labelled pairs cannot be learned from: there are none"):
        Hasher("binary", 16).fit(DIGITS, steps=1, pairs=[])
    with pytest.raises(HashretError, match="model 'itq' has no network that they could train"):
        Hasher("itq", 16).fit(DIGITS, pairs=[(DIGITS[0], DIGITS[1], True)])


@pytest.mark.parametrize("shape", [(30, 30), (60, 20), (20, 60), (1, 9), (9, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    least = 0.1 if dtype is torch.float32 else 0.2
    matrix = u @ torch.diag(torch.linspace(1, least, len(v))) @ v * 1e-3
    turned = u.T @ orthogonalise(matrix.to(dtype)).float() @ v.T
    assert turned.diag().min() > 0.5 and turned.diag().max() < 1.21
    assert (turned - turned.diag().diag()).abs().max() < (1e-5 if dtype is torch.float32 else 0.04)
    assert torch.equal(orthogonalise(torch.zeros(shape)), torch.zeros(shape))


def test_muon_updates_kernels_as_matrices_and_other_weights_as_adamw() -> None:
    torch.manual_seed(0)
    first = torch.nn.Conv2d(3, 8, 3)
    layers = torch.nn.Sequential(first, torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 1).requires_grad_(False))
    copy = deepcopy(layers)
    kernels = copy.get_parameter("0.weight")
    muon = Muon(layers.parameters(), 0.01, weight_decay=0.5, dtype=torch.float32)
    adamw = torch.optim.AdamW(copy.parameters(), 0.01, weight_decay=0.5)
    for _ in range(3):
        x, before = torch.rand(5, 3, 6, 6), first.weight.detach().clone()
        for network, optimiser in ((layers, muon), (copy, adamw)):
            optimiser.zero_grad()
            (network(x) ** 3).mean().backward()
            kernels.data = first.weight.data.clone()  # for the same gradients
            optimiser.step()
        step = (first.weight - before * (1 - 0.01 * 0.5)).flatten(1).detach()
        lengths = torch.linalg.svdvals(step) / (0.01 * UPDATE_SCALE)
        assert 0.5 < lengths.min() < lengths.max() < 1.21
        kernels.data = first.weight.data.clone()
    for name, weights in copy.named_parameters():
        assert torch.equal(weights, layers.get_parameter(name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_minimises_a_quadratic(dtype: torch.dtype) -> None:
    """On a quadratic bowl over a matrix and a kernel: every step goes against the gradient, and the loss falls."""
    torch.manual_seed(0)
    weights = [torch.randn(6, 9, requires_grad=True), torch.randn(5, 4, 3, 3, requires_grad=True)]
    optimiser = Muon(weights, 3e-3, weight_decay=0.0, dtype=dtype)
    losses = []
    for _ in range(50):
        optimiser.zero_grad()
        loss = torch.stack([w.square().sum() for w in weights]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        before = [(w.detach().clone(), w.grad.clone()) for w in weights if w.grad is not None]
        optimiser.step()
        steps = [
            ((w.detach() - old) * gradient).sum().item() for w, (old, gradient) in zip(weights, before, strict=True)
        ]
        assert len(steps) == 2 and max(steps) < 0
        losses.append(loss.item())
    assert all(after < before for before, after in pairwise(losses)) and losses[-1] < 0.8 * losses[0]


@pytest.mark.usefixtures("every_step")
def test_a_training_with_muon_resumes(tmp_path: Path) -> None:
    straight = build("contrastive", muon=True)
    learn(straight)
    assert weights(straight) != trained_weights("contrastive")
    member = build("contrastive", muon=True)
    assert learn(member, checkpoint=tmp_path / "checkpoint", **press_in_progress(5)(member)).interrupted
    member = build("contrastive", muon=True)
    assert learn(member, checkpoint=tmp_path / "checkpoint", resume=True).steps == STEPS
    assert weights(member) == weights(straight)
    with pytest.raises(HashretError, match="is of another training"):
        learn(build("contrastive"), checkpoint=tmp_path / "checkpoint", resume=True)
