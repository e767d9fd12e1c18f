"""Pickles that want to run something, claim too much, or are damaged."""

from __future__ import annotations

import pickle
import struct

from .corpus import ONE, RAN, TB, bad, legacy, zipped
from .pickle_parts import (
    BOMBS,
    CLIP,
    FLOATS,
    HEAD,
    MAKE,
    PROJ,
    SYSTEM,
    Bomb,
    everywhere,
    in_dict,
    in_zip,
    nested,
    number,
    numbers,
    tensor,
    word,
)

for _id, _bomb in BOMBS.items():
    bad(f"bomb-{_id}", _bomb, ".pt")
for _protocol in range(6):
    bad(f"bomb-of-protocol-{_protocol}", pickle.dumps({"a": Bomb()}, _protocol), ".pt")
    bad(f"bomb-of-protocol-{_protocol}-called-safetensors", pickle.dumps(Bomb(), _protocol))
for _id, _value in {
    "plain": Bomb(),
    "in-a-dict": {"visual.proj": ONE, "bomb": Bomb()},
    "in-a-list": [Bomb()],
    "deep-inside": nested(Bomb(), 10),
    "very-deep-inside": nested(Bomb(), 60),
    "behind-the-weights": {"state_dict": {"visual.proj": ONE}, "optimizer": [Bomb()]},
}.items():
    bad(f"bomb-in-a-zip-{_id}", lambda v=_value: zipped(v), ".pt")
    bad(f"bomb-in-a-legacy-file-{_id}", lambda v=_value: legacy(v), ".bin")
bad("bomb-in-a-zip-called-safetensors", lambda: zipped({"a": Bomb()}))
bad("bomb-in-a-legacy-file-called-safetensors", lambda: legacy({"a": Bomb()}))
for _id in ("posix.system", "builtins.eval", "getattr", "name-in-two-parts"):
    everywhere(f"bomb-{_id}", BOMBS[_id])
PERSISTENT = {
    "of-a-number": number(5),
    "of-nothing": b")",
    "of-a-word": word("storage"),
    "of-a-list": b"]",
    "module": b"(" + word("module") + CLIP + word("/etc/passwd") + word("source") + b"t",
    "module-of-nothing": b"(" + word("module") + b"NNNt",
    "storage-without-type": b"(" + word("storage") + b"N" + word("0") + word("cpu") + number(4) + b"t",
    "storage-not-there": FLOATS + word("no") + word("cpu") + number(4) + b"t",
    "storage-outside": FLOATS + word("../code/x") + word("cpu") + number(4) + b"t",
    "storage-of-another-kind": b"(" + word("storage") + CLIP + word("0") + word("cpu") + number(4) + b"t",
    "storage-of-terabytes": FLOATS + word("0") + word("cpu") + number(TB) + b"t",
    "storage-of-words": FLOATS + word("0") + word("cpu") + word("4") + b"t",
}
for _id, _pid in PERSISTENT.items():
    everywhere(f"persistent-{_id}", HEAD + _pid + b"Q.")
everywhere("stride-0-of-terabytes", in_dict((PROJ, tensor(1, (1 << 40,), (0,)))))
everywhere("stride-0-in-two-dimensions", in_dict((PROJ, tensor(4, (1 << 20, 1 << 20, 4), (0, 0, 1)))))
everywhere("shape-beyond-its-storage", in_dict((PROJ, tensor(4, (1000, 1000, 1000), (1000000, 1000, 1)))))
everywhere("shape-of-terabytes", in_dict((PROJ, tensor(4, (10000, 10000, 10000), (100000000, 10000, 1)))))
everywhere("shape-that-overflows", in_dict((PROJ, tensor(4, (1 << 40, 1 << 40), (1 << 40, 1)))))
everywhere("shape-below-zero", in_dict((PROJ, tensor(4, (-4,), (1,)))))
everywhere("shape-of-nothing-times-below-zero", in_dict((PROJ, tensor(0, (0, -1), ()))))
everywhere("shape-below-zero-twice", in_dict((PROJ, tensor(4, (-3, -4), (1, 1)))))
everywhere("stride-below-zero", in_dict((PROJ, tensor(4, (4,), (-1,), 3))))
everywhere("offset-below-zero", in_dict((PROJ, tensor(4, (4,), (1,), -8))))
everywhere("offset-beyond-its-storage", in_dict((PROJ, tensor(4, (4,), (1,), 1 << 60))))
everywhere("shape-and-stride-of-two-lengths", in_dict((PROJ, tensor(4, (2, 2), (1,)))))
everywhere("shape-of-words", in_dict((PROJ, tensor(4, (), ()).replace(numbers(), b"(" + word("a") + b"t", 1))))
everywhere("call-of-a-storage", in_dict((PROJ, b"ctorch.storage\nUntypedStorage\n" + number(1 << 41) + b"\x85R")))
everywhere("call-of-a-typed-storage", in_dict((PROJ, b"ctorch\nFloatStorage\n" + number(1 << 40) + b"\x85R")))
everywhere(
    "storages-of-one-remembered-number",
    HEAD
    + b"}("
    + number(30_000_000)
    + b"q\0"
    + b"".join(
        word(str(n)) + tensor(1, (1,), (1,), key=str(n)).replace(number(1) + b"tQ", b"h\0tQ") for n in range(300)
    )
    + b"u.",
)
for _id, _data in {
    "call-of-a-clip": HEAD + CLIP + word(f"mkdir {RAN}") + b"\x85R.",
    "state-for-a-clip": HEAD + CLIP + b")\x81}" + word("__setstate__") + SYSTEM + b"sb.",
    "class-of-a-clip-changed": HEAD + CLIP + b"}" + word("x") + number(1) + b"sb.",
    "clip-that-is-its-own-part": HEAD + CLIP + b")\x81q\0}" + word("self") + b"h\0sb.",
    "clip-with-odd-parts": HEAD
    + CLIP
    + b")\x81}("
    + word("_modules")
    + number(5)
    + word("_parameters")
    + b"]"
    + word("_buffers")
    + b"N"
    + b"ub.",
    "clip-with-state-of-words": HEAD + CLIP + b")\x81" + word("state") + b"b.",
    "dict-with-items-of-its-own": HEAD
    + b"ccollections\nOrderedDict\n)R}("
    + word("items")
    + number(5)
    + word("get")
    + number(5)
    + word("values")
    + number(5)
    + word("keys")
    + number(5)
    + b"ub.",
    "newobj-ex": b"\x80\x04" + CLIP + b")}\x92.",
    "inst": HEAD + b"(" + word(f"mkdir {RAN}") + b"iposix\nsystem\n.",
    "obj": HEAD + b"(" + SYSTEM + word(f"mkdir {RAN}") + b"o.",
    "ext1": HEAD + b"\x82\x01.",
    "ext4": HEAD + b"\x84\x01\0\0\0.",
    "stack-global": b"\x80\x04" + word("posix") + word("system") + b"\x93" + word(f"mkdir {RAN}") + b"\x85R.",
    "dup-and-pop": HEAD + b"N20.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "newobj-of-eval": HEAD + b"cbuiltins\neval\n" + word(MAKE) + b"\x85\x81.",
    "nothing": HEAD + b"N.",
    "number": HEAD + b"K\x05.",
    "set": HEAD + b"cbuiltins\nset\n]\x85R.",
    "list-that-holds-itself": HEAD + b"]q\0h\0a.",
    "dict-that-holds-itself": HEAD + b"}q\0" + word("a") + b"h\0s.",
    "dict-that-is-its-own-state-dict": HEAD + b"}q\0" + word("state_dict") + b"h\0s.",
    "nothing-on-the-stack": HEAD + b".",
    "more-taken-than-put-down": HEAD + b"R.",
    "mark-without-end": HEAD + b"(" * 1000 + b".",
    "tuple-without-mark": HEAD + b"Nt.",
    "memo-of-nothing": HEAD + b"h\x05.",
    "memo-of-4-billion": HEAD + b"}r\xff\xff\xff\xff.",
    "memo-of-100-million": HEAD + b"}r\xff\xff\xff\x05.",
    "string-of-4-billion": HEAD + b"X\xff\xff\xff\xffabc.",
    "bytes-of-4-billion": HEAD + b"T\xff\xff\xff\xffabc.",
    "long-of-2-billion": HEAD + b"\x8b\xff\xff\xff\x7fabc.",
    "long-in-words": HEAD + b"L" + b"9" * 100_000 + b"L\n.",
    "int-in-words": HEAD + b"I" + b"9" * 100_000 + b"\n.",
    "list-for-a-key": HEAD + b"}]Ns.",
    "protocol-200": b"\x80\xc8}.",
    "tuple-in-tuple-as-key": HEAD + b"})" + b"\x85" * 1_000_000 + b"Ns.",
    "list-in-list": HEAD + b"]" * 150_000 + b"a" * 149_999 + b".",
    "laughing-tuple-as-key": HEAD + b"})" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(90)) + b"Ns.",
    "laughing-tuple-of-many-as-key": HEAD
    + b"})"
    + b"".join(b"q%c(%st" % (n, b"h%c" % n * 200) for n in range(9))
    + b"Ns.",
    "laughing-lists": HEAD + b"]" + b"".join(b"q%c](h%ch%ce" % (n, n, n) for n in range(90)) + b".",
    "laughing-sets": HEAD
    + b"]("
    + b"".join(map(number, range(50_000)))
    + b"eq\0"
    + b"("
    + b"cbuiltins\nset\nh\0\x85R" * 3000
    + b"l."[1:],
    "laughing-dicts": HEAD
    + b"]("
    + b"".join(b"]" + b"(" + number(n) + b"Ne" for n in range(20_000))
    + b"eq\0"
    + b"]q\1"
    + b"ccollections\nOrderedDict\nh\0\x85Ra" * 3000
    + b".",
    "laughing-state": HEAD
    + b"}("
    + b"".join(word(str(n)) + b"N" for n in range(50_000))
    + b"uq\0]"
    + (CLIP + b")\x81h\0ba") * 3000
    + b".",
    "same-long-key-again-and-again": HEAD + b"(" + b"N" * 100_000 + b"tq\0}(" + b"h\0N" * 50_000 + b"u.",
    "endless-operations": HEAD + b"](" + b"N" * 16_000_000 + b"e.",
    "pickle-of-20-mb": HEAD + word("a" * (20 << 20)) + b".",
}.items():
    everywhere(f"pickle-{_id}", _data)
bad("pickle-endless-calls", in_zip(HEAD + b"](" + (CLIP + b")\x81") * 110_000 + b"e."), ".pt", merge=None)


def laughing_modules(levels: int, name: str, entries: int = 0) -> bytes:
    """Return a module in which 2 ** levels paths of long names lead to one module, each module with many entries."""
    more = b"".join(word(f"n{n}") + b"N" for n in range(entries))
    data = CLIP + b")\x81}(" + more + b"ub"
    for level in range(levels):
        again = b"q%c" % level + b"0"
        data += again[:2] + CLIP + b")\x81}(" + word(f"{name}a") + b"h%c" % level + word(f"{name}b") + b"h%c" % level
        data += more + b"ub"
    return HEAD + data + b"."


everywhere("pickle-laughing-modules", laughing_modules(90, "n" * 180))
everywhere("pickle-laughing-modules-with-many-entries", laughing_modules(20, "n", 2000))
