"""The forward pass against open_clip's own, in float64: features and gradients."""

import copy

import open_clip
import pytest
import torch
from clips import TINY, random_clip
from torch.nn import functional as F

from clip_finetune.engine import UserError, build_network, load_full_clip, to_gmp
from clip_finetune.engine.clip.network import checkpoint_activations, compile_blocks
from clip_finetune.engine.clip.tensor_files import same_bits
from clip_finetune.engine.data.tokenizer import cut_to_longest
from clip_finetune.engine.openai import END, START

CLOSE = dict(rtol=1e-10, atol=1e-12)


def texts(*lengths):
    """Tokens of random texts of so many tokens, start and end included."""
    tokens = torch.zeros(len(lengths), TINY.context_length, dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[0], row[length - 1] = START, END
        row[1 : length - 1] = torch.randint(1, START, (length - 2,))
    return tokens


def features_and_gradients(network, encode_image, encode_text, images, tokens):
    network.zero_grad()
    features = encode_image(network, images), encode_text(network, tokens)
    open_clip.ClipLoss()(*(F.normalize(found, dim=1) for found in features), network.logit_scale.exp()).backward()
    return *(found.detach() for found in features), {name: p.grad for name, p in network.named_parameters()}


def ours(network, images, tokens):
    return features_and_gradients(
        network, lambda n, found: n.encode_image(found), lambda n, found: n.encode_text(found), images, tokens
    )


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("gmp", [False, True])
def test_features_and_gradients_are_those_of_open_clips_forward(activation, gmp):
    model = random_clip(activation=activation)
    network = build_network(to_gmp(model) if gmp else model, dtype=torch.float64)
    images, tokens = torch.randn(5, 3, 32, 32, dtype=torch.float64), texts(3, 9, 77, 20, 2)
    theirs = features_and_gradients(
        network,
        lambda n, found: open_clip.CLIP.encode_image(n, found),
        lambda n, found: open_clip.CLIP.encode_text(n, found),
        images,
        tokens,
    )
    found = ours(network, images, tokens)
    for mine, other in zip(found[:2], theirs[:2], strict=True):
        assert other.std() > 0.01
        torch.testing.assert_close(mine, other, **CLOSE)
    assert found[2].keys() == theirs[2].keys()
    for name, gradient in theirs[2].items():
        assert gradient.any(), name
        torch.testing.assert_close(found[2][name], gradient, **CLOSE)


def test_cutting_the_zeros_behind_the_longest_text_changes_nothing():
    network = build_network(random_clip(), dtype=torch.float64)
    images, tokens = torch.randn(3, 3, 32, 32, dtype=torch.float64), texts(5, 17, 11)
    whole, short = ours(network, images, tokens), ours(network, images, tokens[:, :17])
    torch.testing.assert_close(short[1], whole[1], **CLOSE)
    for name, gradient in whole[2].items():
        torch.testing.assert_close(short[2][name], gradient, **CLOSE)
    assert not torch.equal(network.encode_text(tokens[:, :11]), network.encode_text(tokens[:, :17]))


def test_texts_are_cut_to_their_longest_or_the_multiple_above_it():
    tokens = texts(5, 17, 11)
    for multiple, length in ((1, 17), (8, 24), (17, 17), (40, 40), (80, 77)):
        assert torch.equal(cut_to_longest(tokens, multiple), tokens[:, :length])


def test_checkpointed_activations_give_the_same_bits():
    images, tokens = torch.randn(3, 3, 32, 32), texts(5, 17, 11)
    network = build_network(random_clip())
    plain = ours(network, images, tokens)
    checkpoint_activations(network)
    assert network.visual.transformer.grad_checkpointing
    again = ours(network, images, tokens)
    assert all(torch.equal(again[2][name], gradient) for name, gradient in plain[2].items())


@pytest.mark.soak
def test_compiled_blocks_give_the_same_features_and_gradients():
    images, tokens = torch.randn(3, 3, 32, 32, dtype=torch.float64), texts(5, 17, 11)
    network = build_network(random_clip(), dtype=torch.float64)
    plain = ours(network, images, tokens)
    compile_blocks(network)
    calls = []
    for transformer in (network.transformer, network.visual.transformer):
        run = transformer.compiled_block
        transformer.compiled_block = lambda *inputs, run=run: calls.append(inputs) or run(*inputs)
    again = ours(network, images, tokens)
    assert len(calls) == 4
    for name, gradient in plain[2].items():
        torch.testing.assert_close(again[2][name], gradient, **CLOSE)


def test_a_missing_compiler_is_refused_with_a_way_out(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    with pytest.raises(UserError, match="torch.compile does not work here.*switch compile off"):
        compile_blocks(build_network(random_clip(vision_width=128, vision_mlp_width=384)))


def test_running_out_of_memory_is_not_reported_as_a_compiler_error(monkeypatch):
    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: full)
    with pytest.raises(torch.OutOfMemoryError):
        compile_blocks(build_network(random_clip()))


@pytest.mark.parametrize("gmp", [False, True])
def test_a_network_is_copied_pickled_and_opened_again(tmp_path, gmp):
    model = to_gmp(random_clip()) if gmp else random_clip()
    network = build_network(model)
    torch.save(network, tmp_path / "network.pt")
    again = torch.load(tmp_path / "network.pt", weights_only=False)
    opened = load_full_clip(tmp_path / "network.pt").state_dict
    assert all(same_bits(opened[name], tensor) for name, tensor in model.state_dict.items())
    tokens = texts(5, 17, 11)
    for other in (copy.deepcopy(network), again):
        assert torch.equal(other.encode_text(tokens), network.encode_text(tokens))
