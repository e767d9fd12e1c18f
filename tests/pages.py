"""Reads the HTML pages that runs and evaluations write, as a browser would."""

import base64
import io
import re
from html.parser import HTMLParser

from PIL import Image

MAX_BYTES = 2_000_000  # of a page
EVIL = "<script>alert('caught')</script> & \"<img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br"}
ALLOWED = set(
    "html head meta title style body h1 h2 section p pre div table thead tbody tr th td "
    "details summary figure figcaption img footer".split()
)


class Read(HTMLParser):
    """What a browser would see: the text and the images; anything that is not ours fails."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.words, self.images, self.style = [], [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag in ALLOWED, tag
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("href", "style"), name
            if name == "src":
                assert value.startswith("data:image/")
                self.images.append(base64.b64decode(value.split(",", 1)[1], validate=True))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            self.style += data
        else:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read(file) -> Read:
    page = file.read_text(encoding="utf-8")
    assert len(page.encode("utf-8")) <= MAX_BYTES
    bare = re.sub(r'src="data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+"', "", page)
    assert "://" not in bare and "<script" not in bare.lower() and "@import" not in bare and "url(" not in bare
    found = Read(page)
    assert "prefers-color-scheme: dark" in found.style
    for image in found.images:
        Image.open(io.BytesIO(image)).load()
    return found
