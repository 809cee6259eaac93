from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_fixtures import FIVE, HEIGHT, NAMES, SIZE, WIDTH, make_model, make_scene

from mm_model.codec import Codec
from mm_model.conditions import FEATURES
from mm_model.errors import ConfigError
from mm_model.nn.blocks import Attention, fold, unfold
from mm_model.nn.model import SceneModel, Size

MODEL = make_model()


def test_every_subset_encodes_to_the_same_shapes_and_another_scene() -> None:
    scene = make_scene(valid_share=2.0)
    subsets = [s for n in range(1, 6) for s in itertools.combinations(NAMES, n)]
    assert len(subsets) == 31
    seen = []
    for subset in subsets:
        h, z = MODEL.encode(*MODEL.codec.encode(scene.only(*subset)))
        assert h.shape == (3, 2, 3, SIZE.dim)
        assert z.shape == (3, SIZE.scene_channels, 2, 3)
        assert torch.isfinite(z).all()
        seen.append(z)
    for a, b in itertools.combinations(seen, 2):
        assert not torch.allclose(a, b, atol=1e-4)


def test_nothing_observed_encodes() -> None:
    x, mask = MODEL.codec.empty(2, HEIGHT, WIDTH)
    assert torch.isfinite(MODEL.encode(x, mask).z).all()


def test_absent_is_not_zero() -> None:
    x, mask = MODEL.codec.empty(2, HEIGHT, WIDTH)
    absent = MODEL.encode(x, mask).z
    mask[:, 2] = True  # the same zeros, but known
    assert not torch.allclose(MODEL.encode(x, mask).z, absent, atol=1e-3)


def test_encoder_cannot_see_what_the_mask_hides() -> None:
    x, mask = MODEL.codec.encode(make_scene())
    junk = torch.where(MODEL.channelwise(mask), x, float("nan"))
    assert torch.equal(MODEL.encode(junk, mask).z, MODEL.encode(x, mask).z)


def test_decoder_depends_on_the_scene_the_roles_and_the_time() -> None:
    x, mask = MODEL.codec.encode(make_scene(valid_share=2.0))
    present, wanted = mask.clone(), mask.clone()
    present[:, 1:], wanted[:, :1] = False, False
    t, z = torch.full((3, 5), 0.3), torch.randn(3, SIZE.scene_channels, 2, 3)
    unknown = torch.zeros(3, FEATURES)
    raw = MODEL.decode(x, t, present, wanted, z, unknown)
    assert raw.shape == x.shape
    for other in (
        MODEL.decode(x, t, present, wanted, -z, unknown),
        MODEL.decode(x, 2 * t, present, wanted, z, unknown),
        MODEL.decode(x, t, wanted, present, z, unknown),
        MODEL.decode(x, t, present, wanted, z, torch.ones(3, FEATURES)),
    ):
        assert not torch.allclose(raw, other, atol=1e-3)
    later = t.clone()
    later[:, 0] = 0.9  # not wanted: its time means nothing
    assert torch.equal(MODEL.decode(x, later, present, wanted, z, unknown), raw)


def test_estimate_is_a_posterior_mean_of_classes() -> None:
    raw = torch.randn(2, 19, 4, 6)
    estimate = MODEL.estimate(raw)
    assert torch.equal(estimate[:, :8], raw[:, :8])
    assert torch.allclose(estimate[:, 8:].sum(1), torch.zeros(2, 4, 6), atol=1e-6)


def test_fold_is_inverted_by_unfold() -> None:
    tokens = torch.randn(2, 8, 12, 5)
    assert fold(tokens, 4).shape == (2, 2, 3, 80)
    assert torch.equal(unfold(fold(tokens, 4), 4), tokens)
    assert torch.equal(fold(tokens, 4)[0, 1, 2].view(4, 4, 5), tokens[0, 4:8, 8:12])


def test_small_and_large_attention_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    attention = Attention(32, 4).double()
    torch.nn.init.normal_(attention.out.weight)
    x = torch.randn(2, 35, 32, dtype=torch.float64)
    small = attention(x)
    monkeypatch.setattr("mm_model.nn.blocks.SMALL_ATTENTION_TOKENS", 0)
    assert torch.allclose(attention(x), small, atol=1e-12)


def test_configuration_rebuilds_the_model_through_json() -> None:
    copy = SceneModel.from_config(json.loads(json.dumps(MODEL.config)))
    copy.load_state_dict(MODEL.state_dict(), strict=True)
    x, mask = MODEL.codec.encode(make_scene())
    assert torch.equal(copy.eval().encode(x, mask).z, MODEL.encode(x, mask).z)
    assert copy.config == MODEL.config
    with pytest.raises(ConfigError, match="model configuration"):
        SceneModel.from_config({**MODEL.config, "size": {"dim": 3}})


def test_modalities_must_be_the_codec_s() -> None:
    with pytest.raises(ConfigError, match="modalities of the model"):
        SceneModel(FIVE[:2], SIZE, Codec(FIVE, None), [])


def test_tiny_has_the_parameters_that_were_measured() -> None:
    size = Size(64, 96, 192, 2, 6, 3, 3, 16)
    model = SceneModel(FIVE, size, Codec(FIVE, None), [])
    millions = [
        round(sum(p.numel() for p in part.parameters()) / 1e6, 1)
        for part in (model.encoder, model.flow, model.decoder)
    ]
    assert millions == [1.2, 3.0, 3.2]
