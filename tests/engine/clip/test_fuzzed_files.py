"""Whole model files with some of their bytes changed, and files made at random: each opens or is refused in a line.

By default a few of each kind, always the same; with -m soak thousands, different each time.
"""

import json
import os
import time

import pytest
from bad_files import HEAD, HUGGING_FACE, OPENAI, entry, in_legacy, raw_safetensors, rebuilt, tensor, whole, word

from clip_finetune.engine import UserError, load_full_clip, merge_text_encoder
from clip_finetune.engine.cli.info import describe

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "4000"))  # of each kind, where the soak is asked for
LONGEST = 10  # seconds of the processor's time


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    file.write_bytes(whole("ours"))
    return load_full_clip(file)


@pytest.fixture
def fuzz(soak, request):
    """Return a function of a strategy, what to do with each example, and how many are enough by default."""

    def run(strategy, check, few):
        count = [0, 0]

        @hypothesis.settings(
            max_examples=EXAMPLES if soak else few,
            deadline=None,
            derandomize=not soak,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(strategy)
        def one(example):
            opened = check(example)
            count[0], count[1] = count[0] + 1, count[1] + opened

        one()
        if soak:
            print(f"\n{request.node.name}: {count[0]} examples, of which {count[1]} opened")

    return run


def opens(path, base):
    """Return whether a file opens; if not, assert that every way to open it refuses it in one line that names it."""
    opened = False
    for way in (load_full_clip, describe, lambda file: merge_text_encoder(file, base)):
        started = time.process_time()
        try:
            way(path)
            opened = True
        except UserError as error:
            text = str(error)
            assert text.isprintable() and len(text) < 900 and str(path.parent) in text, text
        assert time.process_time() - started < LONGEST
    return opened


def written(folder, name, content):
    """Write a new file: whoever maps the one before must not see it change."""
    file = folder / name
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    return file


# ---- bytes -----------------------------------------------------------------------------------------------------------

ODD = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1]


def offsets(content):
    """Offsets at which to change something, most often near headers and directories."""
    spots = {0, len(content)} | {content.rfind(mark) for mark in (b"data.pkl", b"PK\5\6", b"PK\1\2", b"__metadata__")}
    near = st.builds(
        lambda spot, by: min(max(spot + by, 0), len(content)), st.sampled_from(sorted(spots)), st.integers(-1500, 3000)
    )
    return near | st.integers(0, len(content))


def changes(content):
    offset = offsets(content)
    return st.one_of(
        st.tuples(st.just("flip"), offset, st.integers(1, 255)),
        st.tuples(st.just("cut"), offset, st.integers(1, 64) | st.integers(1, len(content))),
        st.tuples(st.just("insert"), offset, st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("splice"), offset, offset, st.integers(1, 200)),
        st.tuples(st.just("number"), offset, st.sampled_from(ODD), st.sampled_from([1, 2, 4, 8])),
    )


def changed(content, made):
    """Return the content with some changes made to it."""
    content = bytearray(content)
    for kind, offset, *arguments in made:
        offset = min(offset, len(content))
        if kind == "flip":
            content[offset : offset + 1] = bytes(byte ^ arguments[0] for byte in content[offset : offset + 1])
        elif kind == "cut":
            del content[offset : offset + arguments[0]]
        elif kind == "insert":
            content[offset:offset] = arguments[0]
        elif kind == "splice":
            content[offset : offset + arguments[1]] = content[arguments[0] : arguments[0] + arguments[1]]
        else:
            number = arguments[0] & ((1 << 8 * arguments[1]) - 1)
            content[offset : offset + arguments[1]] = number.to_bytes(arguments[1], "little")
    return bytes(content)


@pytest.mark.parametrize("kind", ["openai", "ours", "hugging_face", "zip", "legacy", "module", "script"])
def test_a_changed_model_file_opens_or_is_refused(kind, fuzz, base, tmp_path):
    content = whole(kind)

    def check(made):
        return opens(written(tmp_path, f"{kind}.pt", changed(content, made)), base)

    fuzz(st.lists(changes(content), min_size=1, max_size=4), check, 150)


INDEX = json.dumps({"metadata": {"total_size": 5}, "weight_map": dict.fromkeys(OPENAI, "part.safetensors")}).encode()
SECTION = {"num_attention_heads": 1, "hidden_act": "quick_gelu", "hidden_size": 16}
HF_CONFIG = json.dumps({"model_type": "clip", "text_config": SECTION, "vision_config": SECTION}).encode()
OPEN_CLIP_CONFIG = json.dumps(
    {
        "model_cfg": {
            "embed_dim": 16,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 16},
            "text_cfg": {"heads": 1},
        }
    }
).encode()
SIDE_FILES = {
    "model.safetensors.index.json": (INDEX, "part.safetensors"),
    "config.json": (HF_CONFIG, "model.safetensors"),
    "open_clip_config.json": (OPEN_CLIP_CONFIG, "model.safetensors"),
}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_changed_index_or_config_lets_the_model_open_or_be_refused(name, fuzz, base, tmp_path):
    content, model = SIDE_FILES[name]
    (tmp_path / model).write_bytes(whole("openai"))
    opened = tmp_path / (name if "index" in name else model)

    def check(made):
        written(tmp_path, name, changed(content, made))
        return opens(opened, base)

    fuzz(st.lists(changes(content), min_size=1, max_size=3), check, 150)


# ---- what the bytes say ----------------------------------------------------------------------------------------------

OTHER_NAMES = [
    "state_dict",
    "model",
    "visual.layer1.0.conv1.weight",
    "visual.attnpool.positional_embedding",
    "positional_embedding_res",
    "lora_a",
    "optimizer.a",
]
NAMES = st.sampled_from([*OPENAI, *HUGGING_FACE, *OTHER_NAMES]) | st.text(max_size=8)
SIZES = st.sampled_from([0, 1, 2, 3, 16, 64, 1 << 31, 1 << 40, (1 << 63) - 1, -1]) | st.integers(0, 20)
SHAPES = st.lists(SIZES, max_size=5)
DTYPES = st.sampled_from(
    ["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "U8", "BOOL", "C64"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "vision_layers",
    "text_layers",
    "text_width",
    "vision_width",
    "text_heads",
    "patch_size",
    "image_size",
    "other",
]
ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "C64": 8}


@st.composite
def headers(draw):
    """Draw the header of a safetensors file, mostly with offsets that fit, and the size of its data."""
    header, end = {}, 0
    for name in draw(st.lists(NAMES, max_size=12, unique=True)):
        dtype, shape = draw(DTYPES), list(OPENAI.get(name) or HUGGING_FACE.get(name) or (2,))
        if draw(st.integers(0, 3)) == 0:
            shape = draw(SHAPES)
        size = ITEM_SIZES.get(dtype, 1)
        for count in shape:
            size *= min(max(count, 0), 1 << 20)
        size = min(size, 100_000)
        header[name] = entry(shape, [end, end + size + draw(st.sampled_from([0] * 9 + [1, -1]))], dtype)
        end += size
    return header, end


@st.composite
def metadata(draw):
    """Draw our metadata with some of its values replaced."""
    header_length = int.from_bytes(whole("ours")[:8], "little")
    description = json.loads(json.loads(whole("ours")[8 : 8 + header_length])["__metadata__"]["clip_finetune"])
    for key in draw(st.lists(st.sampled_from(["activation", "provenance", "notes", "architecture"]), max_size=2)):
        description[key] = draw(JSON)
    if isinstance(description["architecture"], dict):
        description["architecture"] |= draw(st.dictionaries(st.sampled_from(FIELDS), JSON | SIZES, max_size=2))
    return json.dumps(description)


def test_a_safetensors_file_with_any_header_opens_or_is_refused(fuzz, base, tmp_path):
    def check(example):
        header, size = example
        return opens(written(tmp_path, "a.safetensors", raw_safetensors(header, bytes(size))), base)

    fuzz(headers(), check, 300)


def test_a_model_with_any_metadata_opens_or_is_refused(fuzz, base, tmp_path):
    content = whole("openai")
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])

    def check(description):
        made = raw_safetensors(header | {"__metadata__": {"clip_finetune": description}}, content[8 + length :])
        return opens(written(tmp_path, "a.safetensors", made), base)

    fuzz(metadata(), check, 200)


# ---- pickles ---------------------------------------------------------------------------------------------------------

GLOBALS = [
    f"c{module}\n{name}\n".encode()
    for module, name in (
        ("collections", "OrderedDict"),
        ("builtins", "set"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch", "FloatStorage"),
        ("torch", "float32"),
        ("clip.model", "CLIP"),
        ("torch.nn.modules.linear", "Linear"),
        ("__torch__", "CLIP"),
        ("torch.jit._pickle", "build_intlist"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        ("torch", "float_power"),
    )
]
SMALL_NUMBERS = st.sampled_from([0, 1, 2, 4, 16, 100, 1 << 31, 1 << 62, -1])
TENSORS = st.builds(
    lambda elements, size, stride, offset, key: tensor(elements, tuple(size), tuple(stride), offset, key),
    SMALL_NUMBERS,
    st.lists(SMALL_NUMBERS, max_size=4),
    st.lists(SMALL_NUMBERS, max_size=4),
    SMALL_NUMBERS,
    st.sampled_from(["0", "1", "20", "no"]),
)
TEXTS = st.sampled_from(["_modules", "_parameters", "_buffers", "items", "get", "__setstate__", "__class__", "module"])
WORDS = st.builds(word, NAMES.map(lambda name: name.encode(errors="replace").decode()) | TEXTS)
MEMO = st.builds(lambda kind, index: kind + bytes([index]), st.sampled_from([b"q", b"h"]), st.integers(0, 5))
ATOMS = (
    st.sampled_from(
        [
            b"N",
            b"\x88",
            b"\x89",
            b")",
            b"]",
            b"}",
            b"K\x07",
            b"M\xff\xff",
            b"J\xff\xff\xff\xff",
            b"G\x7f\xf8\0\0\0\0\0\0",
            b"\x8a\x09\0\0\0\0\0\0\0\0\x7f",
            b"U\x02\xff\xfe",
            b"\x8f",
        ]
    )
    | WORDS
    | MEMO
)
OPERATIONS = st.sampled_from([b"(", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"Q", b"R", b"\x81", b"b"])
VALUES = st.recursive(
    ATOMS | TENSORS | st.sampled_from(GLOBALS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda parts: b"(" + b"".join(parts) + b"t"),
        st.lists(inner, max_size=4).map(lambda parts: b"](" + b"".join(parts) + b"e"),
        st.lists(st.tuples(WORDS | inner, inner), max_size=4).map(
            lambda parts: b"}(" + b"".join(key + value for key, value in parts) + b"u"
        ),
        st.tuples(inner).map(lambda parts: parts[0] + b"q\1"),
        st.tuples(st.sampled_from(GLOBALS), inner).map(lambda parts: parts[0] + parts[1] + b"\x85R"),
        st.tuples(st.sampled_from(GLOBALS), inner).map(lambda parts: parts[0] + b")\x81" + parts[1] + b"b"),
        st.tuples(inner, inner).map(lambda parts: parts[0] + parts[1] + b"b"),
        st.tuples(inner).map(lambda parts: b"(" + word("storage") + parts[0] + word("0") + word("cpu") + b"K\4tQ"),
    ),
    max_leaves=12,
)
PROGRAMS = st.lists(ATOMS | OPERATIONS | OPERATIONS | TENSORS | st.sampled_from(GLOBALS), max_size=40).map(b"".join)
STATE_DICTS = st.lists(st.tuples(WORDS, TENSORS | VALUES), max_size=6).map(
    lambda items: b"}(" + b"".join(name + value for name, value in items) + b"u"
)


@pytest.mark.parametrize("container", ["zip", "script", "legacy"])
@pytest.mark.parametrize("made", ["operations", "values", "state_dicts"])
def test_any_pickle_of_the_allowed_operations_opens_or_is_refused(container, made, fuzz, base, tmp_path):
    if container == "legacy":
        first, last = in_legacy(b"<here>")().split(b"<here>")
    programs = {"operations": PROGRAMS, "values": VALUES, "state_dicts": STATE_DICTS}[made]

    def check(program):
        data = HEAD + program + b"."
        content = first + data + last if container == "legacy" else rebuilt(whole(container), {"data.pkl": data})
        opened = opens(written(tmp_path, "a.pt", content), base)
        assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]
        return opened

    fuzz(programs, check, 200)
