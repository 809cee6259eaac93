"""What learns learns, within its budget, and every method answers in one form."""

import time

import numpy as np
import pytest
import torch
from bench_fixtures import HEIGHT, NAMES, TEST, WIDTH, make_regime, make_store

from benchmarks.model.methods import NoScene, SceneMethod, applies, factories
from benchmarks.model.pairs import ask, draws_of, evaluate_pairs, key, summary
from benchmarks.model.regimes import UNSEEN, make_view, show_pair
from benchmarks.model.specialists import Pair, Pix2Pix, Specialists, UNetKind
from benchmarks.model.training import fit, pace


@pytest.fixture(scope="module")
def regime(tmp_path_factory):
    return make_regime(tmp_path_factory.mktemp("regime"))


def batch(regime, count=8):
    patches = [regime.train.read(i) for i in range(count)]
    from mm_model.training.dataset import collate

    return regime.codec.encode(collate(patches, regime.modalities))


class Clock:
    """Learns nothing, and takes a tenth of a CPU second for it."""

    def __init__(self):
        self.paces, self.finished = [], False

    def step(self, number, x, mask, pace):
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        self.paces.append(pace)
        return 0.0

    def finish(self):
        self.finished = True


def test_the_budget_stops_training_and_decides_the_pace(regime):
    clock = Clock()
    effort = fit(clock, regime, regime.train_at, NAMES, seed=0, budget_s=1.0)
    assert 1.0 <= effort.cpu_s < 1.5
    assert effort.steps == len(clock.paces) <= 10
    assert effort.samples == 16 * effort.steps
    assert clock.finished
    assert clock.paces[3] == 1 > clock.paces[-1] > 0


def test_the_pace_warms_up_and_cools_down():
    shares = np.linspace(0, 1, 101)
    paces = [pace(s) for s in shares]
    assert 0 < paces[0] < 0.1
    assert paces[10] == paces[69] == 1
    assert paces[85] == pytest.approx(0.5)
    assert paces[100] == 0


def test_a_loss_that_is_not_finite_stops_training(regime):
    clock = Clock()
    clock.step = lambda *_: float("nan")
    with pytest.raises(RuntimeError, match="loss of step 0"):
        fit(clock, regime, regime.train_at, NAMES, seed=0, budget_s=1.0)


@pytest.mark.parametrize("kind", [UNetKind(), Pix2Pix()])
def test_a_specialist_learns_an_identity_in_a_few_steps(regime, kind):
    torch.manual_seed(0)
    pair = Pair(regime, "rgb", "nir")
    network = kind.network(pair)
    learner = kind.learner(network, pair)
    x, mask = batch(regime, 16)
    losses = [learner.step(i, x, mask, 1.0) for i in range(60)]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_a_specialist_learns_classes(regime):
    torch.manual_seed(0)
    pair = Pair(regime, "rgb", "map")
    network = UNetKind().network(pair)
    learner = UNetKind().learner(network, pair)
    x, mask = batch(regime, 16)
    losses = [learner.step(i, x, mask, 1.0) for i in range(60)]
    assert losses[-1] < 0.3 * losses[0]


def test_dropout_of_pix2pix_is_a_function_of_the_seed(regime):
    torch.manual_seed(0)
    network = Pix2Pix().network(Pair(regime, "rgb", "nir")).eval()
    x = torch.randn(1, 3, HEIGHT, WIDTH).expand(3, -1, -1, -1)
    made = network(x, [7, 8, 7])
    assert torch.equal(made[0], made[2])
    assert not torch.equal(made[0], made[1])


@pytest.mark.parametrize("name", [n for n in factories() if applies(n, "complete")])
def test_every_method_answers_every_pair_in_one_form(regime, name):
    torch.manual_seed(0)
    method = factories()[name](regime)
    method.train(regime, seed=0, budget_s=0.2, label="")
    method.module.eval()
    patches = [regime.test.read(i) for i in range(3)]
    question = ask(regime, patches, "rgb", ["nir", "map"], samples=2, steps=1)
    made = method.answer(question)
    assert made.shape[0] == 3
    assert made.shape[1] in (1, 2)
    assert made.shape[2:] == (regime.codec.channels, HEIGHT, WIDTH)
    assert torch.isfinite(made).all()
    draws = draws_of(regime, made, ["nir", "map"])
    assert draws["nir"][0].mean.shape == (1, HEIGHT, WIDTH)
    assert set(np.unique(draws["map"][0].mean)) <= set(regime.codec.by_name["map"].class_codes)


def test_looking_up_colours_finds_what_follows_from_them(regime):
    methods = {n: factories()[n](regime) for n in ("nearest_colour", "mean")}
    found = {}
    for name, method in methods.items():
        method.train(regime, seed=0, budget_s=0, label="")
        rows = evaluate_pairs(method, regime, patches=TEST, samples=2)
        assert len(rows) == len(NAMES) * (len(NAMES) - 1)
        found[name] = rows[key("rgb", "nir")]["psnr_of_mean_db"], summary(rows)
    assert found["nearest_colour"][0] > found["mean"][0] + 10
    assert found["nearest_colour"][1]["pairs_miou"] > found["mean"][1]["pairs_miou"]


def test_the_mean_is_the_best_constant(regime):
    method = factories()["mean"](regime)
    method.train(regime, seed=0, budget_s=0, label="")
    question = ask(regime, [regime.test.read(0)], "map", ["nir"], samples=1)
    made = draws_of(regime, method.answer(question), ["nir"])["nir"][0].mean
    recorded = regime.statistics["modalities"]["nir"]["bands"][0]["mean"]
    assert made == pytest.approx(recorded, rel=1e-3)


def test_without_a_scene_the_decoder_alone_learns(regime):
    torch.manual_seed(0)
    ours, joint = SceneMethod(regime), SceneMethod(regime, NoScene)
    names = {n.split(".")[0] for n, _ in joint.module.named_parameters()}
    assert names == {"decoder"}
    assert sum(p.numel() for p in ours.module.parameters()) > sum(
        p.numel() for p in joint.module.parameters()
    )
    x, mask = batch(regime)
    loss = joint.loss(0, 3, x, mask)
    loss.backward()
    assert torch.isfinite(loss)
    # What only a scene could move has no gradient.
    assert float(joint.model.decoder.from_scene.weight.grad.abs().max()) == 0


def test_without_a_scene_an_unseen_pair_is_asked_directly(tmp_path):
    whole = make_store(tmp_path / "whole", 0, 36)
    view = make_view(whole, show_pair(NAMES, UNSEEN), tmp_path / "view")
    regime = make_regime(tmp_path, view)
    torch.manual_seed(0)
    method = SceneMethod(regime, NoScene)
    with torch.no_grad():
        for parameter in method.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    method.module.eval()
    source, target = sorted(UNSEEN)
    answers = []
    for position in (0, 1):
        question = ask(regime, [regime.test.read(position)], source, [target], samples=1, steps=1)
        # The same noise for both, so that a difference comes from what is shown.
        answers.append(method.answer(ask_with_seed(question)))
    assert not torch.equal(*answers)


def ask_with_seed(question):
    from dataclasses import replace

    return replace(question, seeds=((5,),))


def test_specialists_go_through_a_third_modality_where_a_pair_was_never_seen(tmp_path):
    whole = make_store(tmp_path / "whole", 0, 36)
    view = make_view(whole, show_pair(NAMES, UNSEEN), tmp_path / "view")
    regime = make_regime(tmp_path, view)
    method = Specialists(regime, UNetKind())
    source, target = sorted(UNSEEN)
    assert f"{source}_{target}" not in method.module
    assert len(method.module) == len(NAMES) * (len(NAMES) - 1) - 2
    assert method.answers(source, target)
    question = ask(regime, [regime.test.read(0)], source, [target], samples=1)
    channels = regime.codec.slices[target]
    assert method.answer(question)[:, :, channels].abs().max() > 0
