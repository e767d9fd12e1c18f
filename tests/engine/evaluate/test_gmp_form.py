"""r and theta of the MLP rows against numpy."""

import json
import math
import time

import numpy
import pytest
import torch
from clips import VIT_L_14, gigabytes_above, random_clip
from torch.nn import functional as F

from clip_finetune.engine import (
    to_gmp,
)
from clip_finetune.engine.clip.gmp import weight_to_gmp
from clip_finetune.engine.evaluate import gmp_form


def test_r_and_theta_are_those_of_the_weights(model):
    found = gmp_form.gmp_form(model)
    assert [(one.tower, one.layer, one.depth) for one in found.layers] == [
        (tower, layer, depth) for tower in ("vision", "text") for layer in ("c_fc", "c_proj") for depth in (0, 1)
    ]
    for one in found.layers:
        prefix = "visual." if one.tower == "vision" else ""
        weight = model.state_dict[f"{prefix}transformer.resblocks.{one.depth}.mlp.{one.layer}.weight"].double().numpy()
        lengths = numpy.linalg.norm(weight, axis=1)
        numpy.testing.assert_allclose(one.r, numpy.quantile(lengths, gmp_form.QUANTILES), rtol=1e-6)
        scaled = weight / lengths[:, None] * weight.shape[1] ** 0.5
        width = 2 * gmp_form.THETA_END / gmp_form.THETA_BINS
        numpy.testing.assert_allclose(
            one.theta, numpy.quantile(scaled, gmp_form.THETA_QUANTILES, method="inverted_cdf"), atol=width
        )
        assert sum(one.theta_histogram) == weight.size and one.turned is None
    assert gmp_form.PLAIN in found.notes


def test_a_gmp_model_has_the_distributions_of_its_plain_form_and_signs_are_kept(model):
    plain, gmp = gmp_form.gmp_form(model), gmp_form.gmp_form(to_gmp(model))
    assert not gmp.notes
    for one, other in zip(plain.layers, gmp.layers, strict=True):
        numpy.testing.assert_allclose(one.r, other.r, rtol=1e-6)
        assert numpy.abs(numpy.subtract(one.theta_histogram, other.theta_histogram)).sum() < 20  # at the bins' edges
    name = "transformer.resblocks.0.mlp.c_fc"
    turned = to_gmp(model)
    turned = turned.derive(
        {f"{name}.r": -turned.state_dict[f"{name}.r"], f"{name}.theta": 3 * turned.state_dict[f"{name}.theta"]},
        step="negative",
    )
    found = next(one for one in gmp_form.gmp_form(turned, model).layers if one.tower == "text" and one.layer == "c_fc")
    assert found.r[1] < 0 and found.turned[1] == pytest.approx(180, abs=0.1)


def test_the_angles_of_rows_turned_by_known_degrees_are_measured(model):
    name = "visual.transformer.resblocks.1.mlp.c_proj.weight"
    weight = model.state_dict[name].double()
    r, theta = weight_to_gmp(weight)
    aside = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    aside = F.normalize(aside - (aside * theta).sum(1, keepdim=True) * theta, dim=1)
    for degrees in (0.01, 5.0, 90.0, 120.0):
        angle = math.radians(degrees)
        turned = (1.5 * r * (math.cos(angle) * theta + math.sin(angle) * aside)).float()
        found = gmp_form.gmp_form(model.derive({name: turned}, step="turned"), model)
        layers = {(one.tower, one.layer, one.depth): one for one in found.layers}
        assert layers["vision", "c_proj", 1].turned == pytest.approx([degrees] * 3, rel=1e-3)
        assert layers["vision", "c_proj", 0].turned == (0, 0, 0)
        index = found.layers.index(layers["vision", "c_proj", 1])
        numpy.testing.assert_allclose(found.layers[index].r, 1.5 * numpy.array(found.before[index].r), rtol=1e-5)


def test_gmp_charts_are_drawn_with_and_without_a_baseline(model, moved):
    one, two = gmp_form.gmp_form(moved).chart(), gmp_form.gmp_form(to_gmp(moved), model).chart()
    assert one.mode == two.mode == "RGB" and one.tobytes() != two.tobytes()
    json.dumps(gmp_form.gmp_form(moved, model).as_dict(), allow_nan=False)


@pytest.mark.soak
def test_the_gmp_form_of_a_vit_l_14_takes_seconds_and_less_than_a_gigabyte():
    full_clip = to_gmp(random_clip(VIT_L_14))
    start = time.monotonic()
    with gigabytes_above() as grown:
        gmp_form.gmp_form(full_clip, device="cpu").chart()
    assert time.monotonic() - start < 30 and grown[0] < 1, (time.monotonic() - start, grown)
