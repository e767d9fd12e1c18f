"""A model beside its baseline: measures against scikit-learn, transformers, ComfyUI and plain numpy; planted optima."""

import contextlib
import dataclasses
import json
import math
import shutil
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
from clips import CLIP_L, TINY, VIT_L_14, random_clip
from comfyui_server import in_comfyui
from image_folders import class_folder, labels_folder
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from clip_finetune.engine import (
    UserError,
    blend,
    build_network,
    combine_datasets,
    export_text_encoder,
    load_dataset,
    load_full_clip,
    save_full_clip,
    to_gmp,
)
from clip_finetune.engine.clip.encoders import CLIP_G
from clip_finetune.engine.clip.gmp import fold_gmp, weight_to_gmp
from clip_finetune.engine.evaluate import comparison, geometry, gmp_form, sweep
from clip_finetune.engine.evaluate import encoder as encoder_module
from clip_finetune.engine.evaluate.calibration import HIGHEST, best_scale, calibrate_logit_scale, calibration_error
from clip_finetune.engine.evaluate.class_names import scored_by_classes
from clip_finetune.engine.evaluate.comparison import DOUBTFUL, RUINED, SOUND, compare_full_clips, judge
from clip_finetune.engine.evaluate.drift import (
    MOST_PROMPTS,
    PROMPTS,
    conditioning_drift,
    hidden_states,
    host_tokens,
    read_states,
    weight_drift,
)
from clip_finetune.engine.evaluate.encoder import BrokenModel, Encoder
from clip_finetune.engine.evaluate.sweep import Point, blend_sweep, choose
from clip_finetune.engine.evaluate.zero_shot import class_features, eval_zero_shot, sentences_of

PAIRS = [list(range(3 * image, 3 * image + 3)) for image in range(60)]  # three texts a picture


@pytest.fixture(scope="module")
def model():
    return random_clip()


@pytest.fixture(scope="module")
def moved(model):
    return disturbed(model, 0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_dataset(labels_folder(tmp_path_factory.mktemp("pairs") / "a", 20))


def disturbed(model, share, seed=1):
    """Every matrix changed by noise of this share of its own deviation."""
    generator = torch.Generator().manual_seed(seed)
    changed = {
        name: (tensor + share * tensor.float().std() * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in model.state_dict.items()
        if tensor.ndim > 1
    }
    return model.derive(changed, step="disturbed")


def unit(*shape, seed=0):
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(noise + 0.7, dim=1)  # off the centre, as CLIP's are


@pytest.fixture(scope="module")
def clouds():
    return unit(60, 16), unit(180, 16, seed=1)


# ---- geometry --------------------------------------------------------------------------------------------------------


def test_axes_are_those_of_scikit_learns_pca(clouds):
    from sklearn.decomposition import PCA

    images, texts = clouds
    theirs = PCA(2, svd_solver="full").fit(torch.cat(clouds).double().numpy())
    axes = geometry.fit_axes(images, texts)
    numpy.testing.assert_allclose(axes.shares, theirs.explained_variance_ratio_, atol=1e-6)
    other = unit(30, 16, seed=2)  # another model's, on the same axes
    for part in (images, texts, other):
        numpy.testing.assert_allclose(axes.project(part), theirs.transform(part.double().numpy()), atol=1e-6)


def plain_numbers(images, texts):
    """Every measure by its definition, over explicit lists of pairs, in numpy float64."""
    images, texts = images.double().numpy(), texts.double().numpy()

    def pairs_within(rows):
        return [(x, y) for number, x in enumerate(rows) for y in rows[:number]]

    def uniformity(rows):
        return math.log(numpy.mean([math.exp(-2 * ((x - y) ** 2).sum()) for x, y in pairs_within(rows)]))

    def effective_rank(rows):
        values = numpy.linalg.svd(rows, compute_uv=False)
        shares = values / values.sum()
        return math.exp(-(shares * numpy.log(shares)).sum())

    matching = [images[row] @ texts[column] for row, columns in enumerate(PAIRS) for column in columns]
    others = [images[row] @ texts[column] for row in range(60) for column in range(180) if column not in PAIRS[row]]
    return {
        "matching": numpy.mean(matching),
        "other": numpy.mean(others),
        "separation": (numpy.mean(matching) - numpy.mean(others)) / numpy.std(others),
        "similarity_images": numpy.mean([x @ y for x, y in pairs_within(images)]),
        "similarity_texts": numpy.mean([x @ y for x, y in pairs_within(texts)]),
        "effective_rank_images": effective_rank(images),
        "effective_rank_texts": effective_rank(texts),
        "modality_gap": numpy.linalg.norm(images.mean(0) - texts.mean(0)),
        "uniformity_images": uniformity(images),
        "uniformity_texts": uniformity(texts),
        "alignment": numpy.mean(
            [((images[row] - texts[column]) ** 2).sum() for row, columns in enumerate(PAIRS) for column in columns]
        ),
        "histogram_matching": numpy.histogram(matching, geometry.BINS, (-1, 1))[0].tolist(),
        "histogram_other": numpy.histogram(others, geometry.BINS, (-1, 1))[0].tolist(),
    }


@pytest.mark.parametrize("chunk", [7, 1024])
def test_measures_are_their_definitions_in_numpy_whatever_the_chunks(clouds, monkeypatch, chunk):
    monkeypatch.setattr(geometry, "_CHUNK", chunk)
    images, texts = clouds
    pictures = encoder_module.EncodedImages(images, [[row] for row in range(60)], ())
    found = geometry.geometry_of(geometry.Embedded(pictures, texts, PAIRS), geometry.fit_axes(images, texts))
    for name, expected in plain_numbers(images, texts).items():
        assert getattr(found, name) == (
            tuple(expected) if isinstance(expected, list) else pytest.approx(expected, abs=1e-6)
        ), name
    assert found.images == 60 and found.texts == 180 and not found.notes
    json.dumps(found.as_dict(), allow_nan=False)


def test_the_effective_rank_of_known_spectra():
    assert geometry.effective_rank(torch.eye(8)) == pytest.approx(8)
    assert geometry.effective_rank(torch.ones(8, 8)) == pytest.approx(1)
    # Fewer rows than columns: the many zeros must not add up.
    assert geometry.effective_rank(torch.eye(4, 768)) == pytest.approx(4, abs=1e-6)


def test_a_large_set_is_sampled_where_each_pair_counts_and_says_so(clouds, monkeypatch):
    images, texts = clouds
    pictures = encoder_module.EncodedImages(images, [[row] for row in range(60)], ("a note",))
    embedded = geometry.Embedded(pictures, texts, PAIRS)
    whole = geometry.geometry_of(embedded, geometry.axes_of(embedded))
    monkeypatch.setattr(geometry, "MOST_ROWS", 50)
    part = geometry.geometry_of(embedded, geometry.axes_of(embedded))
    by_sums = ("matching", "other", "separation", "similarity_texts", "effective_rank_texts", "alignment")
    assert all(getattr(part, name) == getattr(whole, name) for name in by_sums)
    assert part.uniformity_texts == pytest.approx(whole.uniformity_texts, abs=0.2)
    assert part.uniformity_texts != whole.uniformity_texts
    assert 50 * 50 - 150 <= sum(part.histogram_other) <= 50 * 50
    assert part.notes[0] == "a note" and "50 pictures and texts" in part.notes[1]


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_weight_drift_is_the_relative_frobenius_norm_of_each_layer(model, moved):
    found = weight_drift(moved, model)

    def expected(prefix):
        rows = [
            (moved.state_dict[name].double().numpy(), tensor.double().numpy())
            for name, tensor in model.state_dict.items()
            if name.startswith(prefix)
        ]
        return math.sqrt(sum(((x - y) ** 2).sum() for x, y in rows) / sum((y**2).sum() for _, y in rows))

    layers = {(layer.tower, layer.depth): layer.drift for layer in found.layers if layer.depth is not None}
    assert len(layers) == 4
    for depth in (0, 1):
        assert layers["text", depth] == pytest.approx(expected(f"transformer.resblocks.{depth}."), rel=1e-6)
        assert layers["vision", depth] == pytest.approx(expected(f"visual.transformer.resblocks.{depth}."), rel=1e-6)
    assert found.vision == pytest.approx(expected("visual."), rel=1e-6)
    tokens = next(layer for layer in found.layers if layer.layer == "token embeddings")
    assert tokens.drift == pytest.approx(expected("token_embedding"), rel=1e-6)


def test_a_gmp_model_drifts_as_it_folds(model, moved):
    plain, other = weight_drift(moved, model), weight_drift(to_gmp(moved), model)
    for ours, theirs in zip(plain.layers, other.layers, strict=True):
        assert (ours.tower, ours.layer) == (theirs.tower, theirs.layer)
        assert ours.drift == pytest.approx(theirs.drift, rel=1e-5)


def test_the_temperature_is_told_apart_from_the_weights(model):
    hotter = model.derive({"logit_scale": torch.tensor(math.log(50.0))}, step="hotter")
    found = weight_drift(hotter, model)
    assert found.vision == found.text == 0 and found.logit_scale[1] == pytest.approx(50)


def test_a_resnets_blocks_have_their_places():
    resnet = random_clip(
        vision_layers=(1, 1, 1, 1),
        patch_size=None,
        vision_mlp_width=None,
        vision_width=16,
        vision_heads=8,
        image_size=64,
    )
    found = weight_drift(disturbed(resnet, 0.1), resnet)
    assert sum(layer.tower == "vision" and layer.depth is not None for layer in found.layers) == 4
    assert {entry.tower for entry in gmp_form.gmp_form(resnet, resnet).layers} == {"text"}
    assert gmp_form.gmp_form(resnet, resnet).chart().mode == "RGB"


# ---- what image models read ------------------------------------------------------------------------------------------


def by_transformers(full_clip, tokens, folder):
    """hidden_states and so on of Hugging Face's CLIPTextModel for a model that we exported."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    a = full_clip.architecture
    config = CLIPTextConfig(
        vocab_size=a.vocab_size,
        hidden_size=a.text_width,
        intermediate_size=a.text_mlp_width,
        num_hidden_layers=a.text_layers,
        num_attention_heads=a.text_heads,
        hidden_act=a.activation,
        max_position_embeddings=a.context_length,
        projection_dim=a.embed_dim,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    theirs = CLIPTextModelWithProjection(config).eval()
    theirs.load_state_dict(load_file(export_text_encoder(full_clip, folder / "te.safetensors", dtype="fp32")))
    with torch.no_grad():
        found = theirs(tokens, output_hidden_states=True)
        last = theirs.text_model(tokens).pooler_output
    return {
        "penultimate": found.hidden_states[-2],
        "last": found.last_hidden_state,
        "pooled": last,
        "projected": found.text_embeds,
    }


@pytest.mark.parametrize("gmp", [False, True])
def test_hidden_states_are_those_of_transformers(model, tmp_path, gmp):
    encoder = Encoder.of(to_gmp(model) if gmp else model, device="cpu")
    tokens = host_tokens(encoder, PROMPTS, model.architecture)
    with torch.no_grad():
        ours = hidden_states(encoder.network, tokens)
    for name, theirs in by_transformers(model, tokens, tmp_path).items():
        assert ours[name].shape == theirs.shape
        torch.testing.assert_close(ours[name], theirs, rtol=1e-6, atol=1e-5 if gmp else 1e-6)


def test_conditioning_drift_is_that_of_transformers_states_by_position(model, moved, tmp_path):
    prompts = ["", "a photo of a cat", "a very long caption about nothing at all " * 20]
    found = conditioning_drift(moved, model, prompts, device="cpu")
    tokens = host_tokens(Encoder.of(model, device="cpu"), prompts, model.architecture)
    assert (tokens[0, 1:] == 49407).all() and (tokens[1, 6:] == 49407).all() and (tokens[2] == 49407).sum() <= 3
    after, before = (by_transformers(one, tokens, tmp_path) for one in (moved, model))
    places = {"start": [], "words": [], "end": [], "padding": []}
    for row in range(3):
        end = tokens[row].tolist().index(49407)
        for column in range(77):
            what = "start" if column == 0 else "words" if column < end else "end" if column == end else "padding"
            places[what].append((row, column))
    for state, readers in (("penultimate", "SDXL, SD3"), ("last", "SD1.5")):
        assert found.readers[state] == readers
        for position, where in places.items():
            x = torch.stack([after[state][at] for at in where]).double().numpy()
            y = torch.stack([before[state][at] for at in where]).double().numpy()
            lengths = numpy.linalg.norm(x, axis=1) * numpy.linalg.norm(y, axis=1)
            ours = found.states[state][position]
            assert ours.positions == len(where)
            assert ours.cosine == pytest.approx(((x * y).sum(1) / lengths).mean(), abs=1e-6)
            distance = (numpy.linalg.norm(x - y, axis=1) / numpy.linalg.norm(y, axis=1)).mean()
            assert ours.relative_l2 == pytest.approx(distance, abs=1e-6) and ours.relative_l2 > 0.01
    x, y = after["pooled"].double().numpy(), before["pooled"].double().numpy()
    distance = (numpy.linalg.norm(x - y, axis=1) / numpy.linalg.norm(y, axis=1)).mean()
    assert set(found.states["pooled"]) == {"end"}
    assert found.states["pooled"]["end"].relative_l2 == pytest.approx(distance, abs=1e-6)
    json.dumps(found.as_dict(), allow_nan=False)


def test_sdxl_does_not_see_what_changes_in_the_last_block(model):
    changed = {
        name: tensor + 0.1
        for name, tensor in model.state_dict.items()
        if name.startswith(("transformer.resblocks.1.", "ln_final", "text_projection"))
    }
    found = conditioning_drift(model.derive(changed, step="last block"), model)
    assert all(moved.relative_l2 == 0 for moved in found.states["penultimate"].values())
    assert found.states["last"]["words"].relative_l2 > 0.1 and found.states["pooled"]["end"].relative_l2 > 0.1


def test_a_clip_g_is_padded_with_zeros_and_read_projected():
    width, layers, mlp, heads = CLIP_G
    architecture = dataclasses.replace(
        TINY, text_width=width, text_layers=layers, text_mlp_width=mlp, text_heads=heads, activation="gelu"
    )
    encoder = Encoder.of(random_clip(), device="cpu")  # for its tokenizer
    tokens = host_tokens(encoder, ["a cat"], architecture)
    assert tokens[0].tolist() == [49406, 320, 2368, 49407] + 73 * [0]
    assert host_tokens(encoder, ["a cat"], CLIP_L)[0].tolist() == [49406, 320, 2368] + 74 * [49407]


HOST = """
import comfy.sd1_clip, comfy.sdxl_clip
from types import SimpleNamespace
from comfy.text_encoders import flux, sd3_clip
file, out, *prompts = arguments
half = torch.float32
models = {
    "SD1.5": comfy.sd1_clip.SD1ClipModel(dtype=half).clip_l,
    "SDXL": comfy.sdxl_clip.SDXLClipModel(dtype=half).clip_l,
    "SD3": sd3_clip.SD3ClipModel(clip_l=True, clip_g=False, t5=False, dtype=half).clip_l,
}
flux_l = comfy.sd1_clip.SDClipModel(dtype=half, return_projected_pooled=False)  # as FluxClipModel makes it
models["Flux"] = flux_l
tokenizer = comfy.sd1_clip.SDTokenizer()
found = {}
for name, model in models.items():
    model.load_sd(load_file(file))
    with torch.no_grad():
        rows = [tokenizer.tokenize_with_weights(prompt)[0] for prompt in prompts]
        found["tokens"] = torch.tensor([[token for token, _ in row] for row in rows])
        hidden, pooled = zip(*(model.encode_token_weights([row]) for row in rows))
    found[f"{name} hidden"], found[f"{name} pooled"] = torch.cat(hidden), torch.cat(pooled)
save_file(found, out)
"""


@pytest.mark.comfyui
def test_the_states_are_those_that_comfyui_gives_to_each_image_model(tmp_path):
    model = random_clip(CLIP_L)
    file = export_text_encoder(model, tmp_path / "clip_l.safetensors", dtype="fp32")
    in_comfyui(HOST, file, tmp_path / "found.safetensors", *PROMPTS)
    found = load_file(tmp_path / "found.safetensors")
    encoder = Encoder.of(model, device="cpu")
    assert torch.equal(host_tokens(encoder, PROMPTS, model.architecture), found["tokens"])
    ours = read_states(encoder, PROMPTS, model.architecture).states
    for theirs, name in (
        ("SD1.5 hidden", "last"),
        ("SDXL hidden", "penultimate"),
        ("SD3 hidden", "penultimate"),
        ("SD3 pooled", "pooled"),
        ("Flux pooled", "pooled"),
    ):
        torch.testing.assert_close(ours[name], found[theirs], rtol=1e-5, atol=1e-5)


def test_a_long_list_of_prompts_is_cut_and_none_is_refused(model):
    found = conditioning_drift(model, model, ["a cat"] * (MOST_PROMPTS + 1))
    assert found.prompts == MOST_PROMPTS and "the first 256" in found.notes[0]
    with pytest.raises(UserError, match="no prompt"):
        conditioning_drift(model, model, [])


# ---- the whole comparison --------------------------------------------------------------------------------------------


def test_a_model_beside_itself_has_not_moved(model, data):
    for other in (model, to_gmp(model)):
        found = compare_full_clips(other, other, data)
        assert found.weights.vision == found.weights.text == 0
        assert all(layer.drift == 0 for layer in found.weights.layers)
        for positions in found.conditioning.states.values():
            for moved in positions.values():
                assert moved.relative_l2 == 0 and moved.cosine == pytest.approx(1, abs=1e-12)
        assert found.model == found.baseline and found.calibration_model == found.calibration_baseline
        assert found.health == SOUND and found.verdict == ("The two models are the same.",)


def test_neither_batches_nor_order_nor_copies_change_a_comparison(model, moved, tmp_path, monkeypatch):
    first = compare_full_clips(moved, model, load_dataset(labels_folder(tmp_path / "a", 20)))
    monkeypatch.setattr(encoder_module, "BATCH", 7)
    shutil.copy(tmp_path / "a/000.png", tmp_path / "a/copy.png")
    labels = json.loads((tmp_path / "a/labels.json").read_text())
    labels = dict(reversed((labels | {"copy.png": labels["000.png"]}).items()))
    (tmp_path / "a/labels.json").write_text(json.dumps(labels))
    again = compare_full_clips(moved, model, load_dataset(tmp_path / "a"))
    for one, other in ((first.model, again.model), (first.baseline, again.baseline)):
        assert one.images == other.images == 20 and one.texts == other.texts == 40
        for name, value in one.as_dict().items():
            if isinstance(value, float):
                assert getattr(other, name) == pytest.approx(value, abs=2e-5 if "rank" in name else 2e-6), name
    assert again.conditioning.worst == pytest.approx(first.conditioning.worst, abs=1e-6)
    assert again.calibration_model.ece_stored == pytest.approx(first.calibration_model.ece_stored, abs=1e-5)


def test_each_picture_is_encoded_once_by_each_model(model, moved, data, monkeypatch):
    seen = []
    encode = Encoder.images

    def counted(self, batches, total):
        found = encode(self, batches, total)
        seen.append(len(found[0]))
        return found

    monkeypatch.setattr(Encoder, "images", counted)
    compare_full_clips(moved, model, data)
    assert seen == [20, 20]


def test_both_models_stand_on_the_baselines_axes(model, moved, data):
    found = compare_full_clips(moved, model, data)
    embedded = geometry.embed(Encoder.of(model), data)
    axes = geometry.axes_of(embedded)
    other = geometry.embed(Encoder.of(moved), data)
    assert torch.allclose(found.axes.directions, axes.directions)
    numpy.testing.assert_allclose(found.baseline.points_images, axes.project(embedded.pictures.features), atol=1e-6)
    numpy.testing.assert_allclose(found.model.points_texts, axes.project(other.texts), atol=1e-6)


@pytest.mark.parametrize("kind", ["captions", "classes"])
def test_a_comparison_is_shown_as_table_chart_and_json(model, moved, data, tmp_path, kind):
    chosen = data if kind == "captions" else load_dataset(class_folder(tmp_path / "classes"))
    found = compare_full_clips(moved, model, chosen, prompts=["a cat"])
    chart = found.chart()
    assert chart.mode == "RGB" and chart.width > 900
    assert all(word in found.table() for word in ("effective rank", "SDXL, SD3", "text, block 2", found.verdict[0]))
    said = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert said["conditioning"]["prompts"] == 1 and said["calibration"]["model"]["answers"] == (
        20 if kind == "captions" else 4
    )
    assert any("of fewer than 100" in note for note in found.notes)


def test_weights_in_bf16_and_fp16_are_compared(model, data):
    wide = compare_full_clips(disturbed(model, 0.1), model, data)
    for dtype in (torch.bfloat16, torch.float16):
        one = model.derive({name: tensor.to(dtype) for name, tensor in model.state_dict.items()}, step="half")
        found = compare_full_clips(disturbed(one, 0.1), one, data)
        assert found.model.effective_rank_texts == pytest.approx(wide.model.effective_rank_texts, rel=0.02)
        assert found.conditioning.worst == pytest.approx(wide.conditioning.worst, rel=0.05)
        assert found.health == wide.health


def test_a_model_of_nan_is_refused_by_everything_here(model, data):
    broken = model.derive({"transformer.resblocks.0.mlp.c_fc.weight": torch.full((256, 64), math.nan)}, step="broken")
    for measure in (
        lambda: compare_full_clips(broken, model, data),
        lambda: compare_full_clips(model, broken, data),
        lambda: weight_drift(broken, model),
        lambda: conditioning_drift(broken, model),
        lambda: blend_sweep(broken, model, data, steps=2),
        lambda: gmp_form.gmp_form(broken),
        lambda: geometry.eval_geometry(broken, data),
        lambda: calibrate_logit_scale(broken, data),
    ):
        with pytest.raises(BrokenModel, match="not numbers"):
            measure()


def test_models_of_two_kinds_are_refused_in_one_sentence(model, data):
    other = random_clip(vision_layers=3, embed_dim=16)
    for measure in (
        lambda: compare_full_clips(model, other, data),
        lambda: weight_drift(model, other),
        lambda: conditioning_drift(model, other),
        lambda: blend_sweep(model, other, data),
        lambda: gmp_form.gmp_form(model, other),
    ):
        with pytest.raises(UserError, match="vision_layers 2 and 3.*choose as baseline the model that the training"):
            measure()


def test_too_little_data_is_refused(model, tmp_path):
    single = load_dataset(labels_folder(tmp_path / "a", 1))
    with pytest.raises(UserError, match="1 distinct pictures and 2 distinct texts"):
        compare_full_clips(model, model, single)
    with pytest.raises(UserError, match="set validation_split above 0"):
        compare_full_clips(model, model, single.subset([]))
    with pytest.raises(UserError, match="set validation_split above 0"):
        blend_sweep(model, model, single.subset([]))


def test_cancelling_is_heard_and_progress_ends_at_its_total(model, moved, data):
    class Cancelled(BaseException):
        pass

    def cancel():
        raise Cancelled

    for measure in (
        lambda **host: compare_full_clips(moved, model, data, **host),
        lambda **host: blend_sweep(moved, model, data, steps=3, **host),
        lambda **host: gmp_form.gmp_form(moved, model, **host),
        lambda **host: conditioning_drift(moved, model, **host),
        lambda **host: weight_drift(moved, model, **host),
    ):
        with pytest.raises(Cancelled):
            measure(check_cancelled=cancel)
        counted = []
        measure(on_progress=lambda done, total, counted=counted: counted.append((done, total)))
        assert counted[-1][0] == counted[-1][1] and counted == sorted(counted)


def judged(model, data, states=0.1, vision=0.01, **changes):
    """The verdict on hand-made numbers."""
    found = compare_full_clips(model, model, data, prompts=["a cat"])
    before = dataclasses.replace(
        found.baseline, separation=2.0, effective_rank_images=100.0, effective_rank_texts=100.0
    )
    moved = {
        state: {name: one._replace(relative_l2=states) for name, one in positions.items()}
        for state, positions in found.conditioning.states.items()
    }
    return judge(
        before,
        dataclasses.replace(before, **changes),
        dataclasses.replace(found.weights, vision=vision),
        dataclasses.replace(found.conditioning, states=moved),
    )


@pytest.mark.parametrize(
    "changes, health, words",
    [
        (dict(), SOUND, "stand out from other pairs as before"),
        (dict(separation=2.5), SOUND, "stand out more"),
        (dict(separation=1.5), DOUBTFUL, "stand out less"),
        (dict(separation=0.5), RUINED, "hardly stand out"),
        (dict(effective_rank_texts=40.0), RUINED, "texts have collapsed: they use 40%"),
        (dict(states=0.0), SOUND, "will not change"),
        (dict(states=0.01), SOUND, "hardly change"),
        (dict(states=0.6), DOUBTFUL, "which is far"),
        (dict(vision=0.3), DOUBTFUL, "vision tower's weights have changed by 30%"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(model, data, changes, health, words):
    found, sentences = judged(model, data, **changes)
    assert found == health and words in " ".join(sentences)


def test_a_baseline_that_tells_nothing_apart_is_no_measure(model, data):
    found = compare_full_clips(disturbed(model, 0.01), model, data)
    assert found.baseline.separation < 0.5 and "The baseline itself hardly tells" in found.verdict[1]


# ---- GmP -------------------------------------------------------------------------------------------------------------


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


def test_rows_that_were_turned_by_known_angles_are_found(model):
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


# ---- blends ----------------------------------------------------------------------------------------------------------


def test_a_blend_at_its_ends_is_the_input_bit_by_bit(model, moved):
    for one in (moved, to_gmp(moved)):
        plain = fold_gmp(one)
        assert all(
            torch.equal(blend(one, model, 1).state_dict[name], tensor) for name, tensor in plain.state_dict.items()
        )
        assert all(
            torch.equal(blend(one, model, 0).state_dict[name], tensor) for name, tensor in model.state_dict.items()
        )


def numbers(*rows):
    return [Point(alpha, *scores) for alpha, *scores in rows]


def test_the_rule_on_hand_made_numbers():
    assert choose(numbers((0, 0.5), (0.5, 0.7), (1, 0.6))) == 0.5
    assert choose(numbers((0, 0.5), (0.25, 0.7), (0.5, 0.7), (1, 0.6))) == 0.25, "a tie goes to the smaller alpha"
    # 0.5 is better, but loses more than a point in general; 0.25 loses a point exactly.
    assert choose(numbers((0, 0.5, 0.80), (0.25, 0.6, 0.79), (0.5, 0.7, 0.7899), (1, 0.9, 0.5))) == 0.25
    assert choose(numbers((0, 0.5, 0.80), (0.5, 0.45, 0.85), (1, 0.9, 0.5))) == 0, "the baseline is always allowed"
    assert choose(numbers((0, 0.5, 0.30), (0.5, 0.6, 0.85), (1, 0.9, 0.95))) == 1


def centred(model):
    """With the mean of pictures of noise at zero, so that they fall into different classes."""
    pictures = torch.randn(200, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    network = build_network(model).eval()
    with torch.no_grad():
        mean = network.encode_image(F.interpolate(pictures, 32)).mean(0, keepdim=True)
    projection = model.state_dict["visual.proj"]
    change = torch.linalg.lstsq(projection.T, mean.T).solution[:, 0]
    return model.derive({"visual.ln_post.bias": model.state_dict["visual.ln_post.bias"] - change}, step="centred")


@pytest.fixture(scope="module")
def planted(model, tmp_path_factory):
    """(a baseline, its model, classes that only the blend half way between them tells apart)."""
    model = centred(model)
    noise = {name: tensor - model.state_dict[name] for name, tensor in disturbed(model, 0.5).state_dict.items()}
    ends = [
        model.derive({name: tensor + sign * noise[name] for name, tensor in model.state_dict.items()}, step="end")
        for sign in (-1, 1)
    ]
    folder = tmp_path_factory.mktemp("planted")
    chance = numpy.random.default_rng(0)
    for number in range(80):
        picture = Image.fromarray(chance.integers(0, 256, (4, 4, 3), dtype=numpy.uint8)).resize((32, 32), 0)
        (folder / "all").mkdir(exist_ok=True)
        picture.save(folder / f"all/{number:02}.png")
    # Each picture gets the class that the model in the middle gives it.
    names = ["ant", "boat", "cloud", "door"]
    (folder / "all/labels.json").write_text(json.dumps({f"{n:02}.png": [f"picture {n}"] for n in range(80)}))
    encoder = Encoder.of(model)
    pictures = encoder_module.encode_images(encoder, load_dataset(folder / "all"))
    scores = pictures.features @ class_features(encoder, names, sentences_of("simple")).T
    for row, samples in enumerate(pictures.samples):
        name = names[int(scores[row].argmax())]
        (folder / "classes" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"all/{samples[0]:02}.png", folder / "classes" / name)
    return *ends, load_dataset(folder / "classes")


def test_the_sweep_finds_a_planted_optimum(planted, data):
    baseline, end, classes = planted
    found = blend_sweep(end, baseline, classes, steps=11, templates="simple")
    scores = {point.alpha: point.score for point in found.points}
    assert list(scores) == [step / 10 for step in range(11)]
    assert scores[0.5] == 1.0 and scores[0] < 1 and scores[1] < 1
    assert found.alpha == min(alpha for alpha, score in scores.items() if score == 1.0) and 0 < found.alpha <= 0.5
    assert scores[1] == eval_zero_shot(end, classes, templates="simple").top1
    expected = blend(end, baseline, found.alpha)
    assert all(torch.equal(found.best.state_dict[name], tensor) for name, tensor in expected.state_dict.items())
    both = blend_sweep(end, baseline, data, classes, steps=3, templates="simple")
    assert both.measure == sweep.RETRIEVAL and both.general_measure == sweep.ZERO_SHOT
    assert [point.general for point in both.points] == [scores[0], scores[0.5], scores[1]]
    for one in (found, both):
        assert one.chart().mode == "RGB" and one.table().count("best") == 1 + one.table().lower().count("the best")
        json.dumps(one.as_dict(), allow_nan=False)


def test_a_sweep_of_a_model_with_itself_stays_at_the_baseline(model, data):
    found = blend_sweep(model, model, data, data, steps=2)
    assert found.alpha == 0 and "Best at alpha 0, the baseline" in found.sentence
    assert found.chart().mode == "RGB"
    with pytest.raises(UserError, match="give 2 at least"):
        blend_sweep(model, model, data, steps=1)


# ---- calibration -----------------------------------------------------------------------------------------------------


def answers(scale, seed=0, count=4000, classes=5):
    """(cosines, right answers drawn with the probabilities that this scale gives them)."""
    generator = torch.Generator().manual_seed(seed)
    cosines = 0.3 * torch.rand(count, classes, generator=generator, dtype=torch.float64)
    drawn = torch.multinomial((cosines * scale).softmax(1), 1, generator=generator)
    return cosines, F.one_hot(drawn[:, 0], classes).bool()


def test_the_best_scale_is_that_of_the_least_cross_entropy():
    from scipy.optimize import minimize_scalar

    cosines, right = answers(12.0)

    def loss(scale):
        logits = cosines.numpy() * scale
        return (numpy.log(numpy.exp(logits).sum(1)) - (logits * right.numpy()).sum(1)).mean()

    theirs = minimize_scalar(loss, bounds=(0.1, 100), method="bounded", options={"xatol": 1e-9}).x
    assert best_scale(cosines, right) == pytest.approx(theirs, rel=1e-6) and theirs == pytest.approx(12, rel=0.1)


def test_the_calibration_error_is_guos():
    cosines, right = answers(12.0)
    for scale in (3.0, 12.0, 60.0):
        shares = (cosines * scale).softmax(1).numpy()
        confidence, correct = shares.max(1), right.numpy()[numpy.arange(4000), shares.argmax(1)]
        expected = 0.0
        for number in range(15):
            inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
            if inside.any():
                expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
        assert calibration_error(cosines * scale, right) == pytest.approx(expected, abs=1e-9)
    assert calibration_error(cosines * 12, right) < 0.03 < calibration_error(cosines * 60, right)


def test_answers_that_are_all_right_have_no_best_scale():
    cosines = torch.eye(4, dtype=torch.float64)
    assert best_scale(cosines, torch.eye(4, dtype=torch.bool)) == HIGHEST


def test_a_model_is_calibrated_on_classes_and_on_pairs(planted, data):
    baseline, _, classes = planted
    found = calibrate_logit_scale(baseline, classes)
    assert found.images == 80 and found.answers == len(classes.class_names)
    assert found.stored == pytest.approx(baseline.state_dict["logit_scale"].exp().item())
    # With its best temperature stored, a model stays as it is.
    again = calibrate_logit_scale(
        baseline.derive({"logit_scale": torch.tensor(math.log(found.best))}, step="calibrated"), classes
    )
    assert again.stored == pytest.approx(again.best, rel=1e-4) and again.ece_stored == pytest.approx(found.ece_best)
    pairs = calibrate_logit_scale(baseline, data)
    assert pairs.images == pairs.answers == 20
    json.dumps(pairs.as_dict(), allow_nan=False)


def test_what_decides_between_classes_and_captions(model, moved, data, tmp_path):
    classes = load_dataset(class_folder(tmp_path / "classes"))
    names = {f"{name}/{n}.png": [name] for name in classes.class_names for n in range(3)}
    shutil.copytree(tmp_path / "classes", tmp_path / "named")
    (tmp_path / "named/labels.json").write_text(json.dumps(names))
    named, mixed = load_dataset(tmp_path / "named"), combine_datasets([data, classes])
    assert not named.has_labels and mixed.has_labels
    both = combine_datasets([named, classes])
    assert [scored_by_classes(found) for found in (classes, named, data, mixed, both)] == [True, True] + [False] * 3
    assert sweep.measure_of(mixed) == sweep.RETRIEVAL
    assert calibrate_logit_scale(model, mixed).answers == 20 + 4
    assert calibrate_logit_scale(model, named).best == calibrate_logit_scale(model, classes).best
    found, plain = (blend_sweep(moved, model, chosen, steps=2, templates="simple") for chosen in (named, classes))
    assert found.measure == plain.measure == sweep.ZERO_SHOT and found.points == plain.points
    assert any("first captions of its pictures are taken for" in note for note in found.notes)
    (tmp_path / "one").mkdir()
    shutil.copytree(tmp_path / "classes/red", tmp_path / "one/red")
    with pytest.raises(UserError, match="a single class"):
        blend_sweep(moved, model, load_dataset(tmp_path / "one"), steps=2)
    with pytest.raises(UserError, match="too few pictures with different texts"):
        calibrate_logit_scale(model, load_dataset(tmp_path / "one"))


def test_classes_called_by_wordnets_numbers_are_compared_by_their_names(model, moved, tmp_path, monkeypatch):
    for number, (wnid, name) in enumerate([("n01440764", "tench"), ("n02123045", "tabby cat")]):
        for folder in (f"numbers/{wnid}", f"names/{name}"):
            (tmp_path / folder).mkdir(parents=True)
            Image.new("RGB", (32, 32), (200 * number, 50, 50)).save(tmp_path / folder / "1.png")
    found, plain = (compare_full_clips(moved, model, load_dataset(tmp_path / name)) for name in ("numbers", "names"))
    # Rounding depends on the order in which the classes go through the model.
    assert found.model.separation == pytest.approx(plain.model.separation, rel=1e-5)
    assert found.calibration_model.best == pytest.approx(plain.calibration_model.best, rel=1e-5)
    assert sum("WordNet's numbers for names" in note for note in found.notes) == 1


def test_what_is_said_of_the_baselines_calibration_is_kept(model, moved, data, monkeypatch):
    told = iter([("Of one only.", "Of both."), ("Of both.",)])
    calibrate = comparison.calibration_of
    monkeypatch.setattr(
        comparison, "calibration_of", lambda *given: dataclasses.replace(calibrate(*given), notes=next(told))
    )
    notes = compare_full_clips(moved, model, data).notes
    assert "Of the baseline: Of one only." in notes and notes.count("Of both.") == 1


# ---- size ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def gigabytes_above():
    """A list that gets by how much the process grew at its peak."""
    status, found, done = Path("/proc/self/status"), [], threading.Event()
    if not status.exists():
        pytest.skip("memory is read from /proc")

    def resident():
        return int(status.read_text().split("VmRSS:")[1].split()[0]) / 2**20

    before, peak = resident(), []

    def watch():
        while not done.wait(0.01):
            peak.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.append(max(peak, default=before) - before)


@pytest.mark.soak
def test_the_gmp_form_of_a_vit_l_14_takes_seconds_and_less_than_a_gigabyte():
    full_clip = to_gmp(random_clip(VIT_L_14))
    start = time.monotonic()
    with gigabytes_above() as grown:
        gmp_form.gmp_form(full_clip, device="cpu").chart()
    assert time.monotonic() - start < 30 and grown[0] < 1, (time.monotonic() - start, grown)


@pytest.mark.soak
def test_the_geometry_of_100_000_pictures_fits():
    images, texts = unit(100_000, 768), unit(100_000, 768, seed=1)
    pictures = encoder_module.EncodedImages(images, [[row] for row in range(100_000)], ())
    embedded = geometry.Embedded(pictures, texts, [[row] for row in range(100_000)])
    with gigabytes_above() as grown:
        found = geometry.geometry_of(embedded, geometry.axes_of(embedded))
    assert found.images == 100_000 and grown[0] < 1, grown


# ---- the nodes -------------------------------------------------------------------------------------------------------


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


@pytest.mark.comfyui
def test_compare_plot_blend_and_sweep_in_a_graph(comfyui, model, moved):
    models = comfyui.base / "models/full_clip"
    for name, one in (
        ("compared_old", model),
        ("compared_new", to_gmp(moved)),
        ("compared_other", random_clip(embed_dim=16)),
    ):
        save_full_clip(one, models / f"{name}.safetensors")
    labels_folder(comfyui.base / "datasets/compared", 20)
    class_folder(comfyui.base / "datasets/compared_classes")
    load = {
        "1": node("LoadFullCLIP", model="compared_new.safetensors"),
        "2": node("LoadFullCLIP", model="compared_old.safetensors"),
        "3": node("LoadCLIPDataset", folder="compared", captions="auto", validation_split=0.0, seed=0),
        "4": node("LoadCLIPDataset", folder="compared_classes", captions="auto", validation_split=0.0, seed=0),
    }
    both = dict(full_clip=["1", 0], baseline=["2", 0])
    result = comfyui.queue(
        load
        | {
            "5": node("CompareFullCLIP", dataset=["3", 0], prompts="a cat\n\na dog", **both),
            "6": node("PlotGmP", **both),
            "7": node("BlendFullCLIP", alpha=0.25, **both),
            "8": node("SaveFullCLIP", full_clip=["7", 0], filename_prefix="full_clip/blended"),
            "9": node("BlendSweep", dataset=["3", 0], general=["4", 0], steps=3, templates="simple", **both),
            "10": node("PreviewAny", source=["5", 0]),
            "11": node("PreviewAny", source=["9", 2]),
            "12": node("SaveFullCLIP", full_clip=["9", 0], filename_prefix="full_clip/best"),
        }
    )
    assert result["status"] == "success" and not result["node_errors"], result
    table, swept = (result["outputs"][number]["text"][0] for number in ("10", "11"))
    assert "effective rank of pictures" in table and "SDXL, SD3" in table
    assert "Rule: The highest score on compared among the blends" in swept and swept.splitlines()[-1].startswith("1 ")
    assert all(result["outputs"][number]["images"] for number in ("5", "6", "9"))
    assert "turned by" in result["texts"]["6"] and gmp_form.PLAIN in result["texts"]["6"]
    saved = load_full_clip(comfyui.base / "output/full_clip/blended_00001_.safetensors")
    expected = blend(to_gmp(moved), model, 0.25)
    assert all(torch.equal(saved.state_dict[name], tensor) for name, tensor in expected.state_dict.items())
    assert (comfyui.base / "output/full_clip/best_00001_.safetensors").is_file()
    other = {"2": node("LoadFullCLIP", model="compared_other.safetensors")}
    for number, refused in (
        ("5", node("CompareFullCLIP", dataset=["3", 0], **both)),
        ("6", node("PlotGmP", **both)),
        ("9", node("BlendSweep", dataset=["3", 0], **both)),
    ):
        result = comfyui.queue(load | other | {number: refused})
        assert result["status"] == "error" and "choose as baseline the model that the training" in str(result)
