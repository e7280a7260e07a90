"""Android's binary XML, enough for a manifest: UTF-16 string pool, resource map, elements.

Chunk layouts follow ResourceTypes.h of the Android Open Source Project. Attribute names that have a resource
id come first in the string pool, in the resource map's order, and each element's attributes are sorted by
that id, because the platform looks them up by a merge over both.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from bluelm.errors import InputError

ANDROID = "http://schemas.android.com/apk/res/android"

# Public attribute ids of frameworks/base/core/res/res/values/public.xml.
ATTRIBUTE_IDS = {
    "label": 0x01010001,
    "name": 0x01010003,
    "hasCode": 0x0101000C,
    "value": 0x01010024,
    "minSdkVersion": 0x0101020C,
    "versionCode": 0x0101021B,
    "versionName": 0x0101021C,
    "targetSdkVersion": 0x01010270,
    "allowBackup": 0x01010280,
    "isFeatureSplit": 0x0101055B,
}

_NONE = 0xFFFFFFFF
_STRING, _INTEGER, _BOOLEAN = 0x03, 0x10, 0x12

Value = str | int | bool


@dataclass(frozen=True)
class Element:
    """One XML element; attribute names with the prefix `android:` are in Android's namespace."""

    tag: str
    attributes: dict[str, Value] = field(default_factory=dict)
    children: Sequence[Element] = ()


class _Strings:
    """The string pool: attribute names with ids first, then the rest in order of use."""

    def __init__(self, root: Element) -> None:
        ids: set[str] = set()
        rest: dict[str, None] = {"android": None, ANDROID: None}
        _collect(root, ids, rest)
        self.mapped = sorted(ids, key=ATTRIBUTE_IDS.__getitem__)
        # a name may stand in the pool twice: once with an id and once as plain text
        self.all = [*self.mapped, *rest]
        self._mapped = {text: index for index, text in enumerate(self.mapped)}
        self._plain = {text: len(self.mapped) + index for index, text in enumerate(rest)}

    def name(self, local: str) -> int:
        return self._mapped[local]

    def plain(self, text: str) -> int:
        return self._plain[text]


def _collect(element: Element, ids: set[str], rest: dict[str, None]) -> None:
    rest.setdefault(element.tag)
    for name, value in element.attributes.items():
        local = name.removeprefix("android:")
        if local == name:
            rest.setdefault(name)
        elif local in ATTRIBUTE_IDS:
            ids.add(local)
        else:
            raise InputError(f"the attribute {name} has no known id", where="AndroidManifest.xml")
        if isinstance(value, str):
            rest.setdefault(value)
    for child in element.children:
        _collect(child, ids, rest)


def encode(root: Element) -> bytes:
    """The document as binary XML.

    Raises:
        InputError: an `android:` attribute that is not in the table.
    """
    strings = _Strings(root)
    body = _string_pool(strings.all)
    ids = [ATTRIBUTE_IDS[name] for name in strings.mapped]
    body += struct.pack(f"<HHI{len(ids)}I", 0x0180, 8, 8 + 4 * len(ids), *ids)
    namespace = struct.pack("<II", strings.plain("android"), strings.plain(ANDROID))
    body += _node(0x0100, namespace) + _element(root, strings) + _node(0x0101, namespace)
    return struct.pack("<HHI", 0x0003, 8, 8 + len(body)) + body


def _string_pool(texts: Sequence[str]) -> bytes:
    data, offsets = bytearray(), []
    for text in texts:
        offsets.append(len(data))
        units = text.encode("utf-16-le")
        if len(units) // 2 > 0x7FFF:
            raise InputError("a manifest string is longer than 32767 characters", where="AndroidManifest.xml")
        data += struct.pack("<H", len(units) // 2) + units + b"\0\0"
    data += bytes(-len(data) % 4)
    start = 28 + 4 * len(texts)
    header = struct.pack("<HHIIIIII", 0x0001, 28, start + len(data), len(texts), 0, 0, start, 0)
    return header + struct.pack(f"<{len(offsets)}I", *offsets) + bytes(data)


def _node(kind: int, payload: bytes) -> bytes:
    """One tree node: header, line number 0, no comment."""
    return struct.pack("<HHIII", kind, 16, 16 + len(payload), 0, _NONE) + payload


def _element(element: Element, strings: _Strings) -> bytes:
    attributes = sorted(element.attributes.items(), key=_attribute_order)
    tag = struct.pack("<II", _NONE, strings.plain(element.tag))
    start = tag + struct.pack("<HHHHHH", 20, 20, len(attributes), 0, 0, 0)
    start += b"".join(_attribute(name, value, strings) for name, value in attributes)
    children = b"".join(_element(child, strings) for child in element.children)
    return _node(0x0102, start) + children + _node(0x0103, tag)


def _attribute_order(item: tuple[str, Value]) -> tuple[int, str]:
    """By resource id; attributes without one come last."""
    local = item[0].removeprefix("android:")
    return (ATTRIBUTE_IDS[local] if local != item[0] else _NONE, item[0])


def _attribute(name: str, value: Value, strings: _Strings) -> bytes:
    local = name.removeprefix("android:")
    spaced = local != name
    head = struct.pack(
        "<II",
        strings.plain(ANDROID) if spaced else _NONE,
        strings.name(local) if spaced else strings.plain(name),
    )
    if isinstance(value, bool):
        return head + struct.pack("<IHBBI", _NONE, 8, 0, _BOOLEAN, _NONE if value else 0)
    if isinstance(value, int):
        return head + struct.pack("<IHBBI", _NONE, 8, 0, _INTEGER, value & 0xFFFFFFFF)
    index = strings.plain(value)
    return head + struct.pack("<IHBBI", index, 8, 0, _STRING, index)


def pack_manifest(
    package: str, version_code: int, version_name: str, label: str, min_sdk: int, target_sdk: int
) -> bytes:
    """AndroidManifest.xml of a model pack without code: the base APK."""
    return encode(
        Element(
            "manifest",
            {
                "package": package,
                "android:versionCode": version_code,
                "android:versionName": version_name,
            },
            (
                Element("uses-sdk", {"android:minSdkVersion": min_sdk, "android:targetSdkVersion": target_sdk}),
                Element(
                    "application",
                    {"android:label": label, "android:hasCode": False, "android:allowBackup": False},
                ),
            ),
        )
    )


def split_manifest(package: str, version_code: int, split: str, min_sdk: int, target_sdk: int) -> bytes:
    """AndroidManifest.xml of one split of a model pack: same package and version, a name of its own."""
    return encode(
        Element(
            "manifest",
            {
                "package": package,
                "split": split,
                "android:versionCode": version_code,
                "android:isFeatureSplit": True,
            },
            (
                Element("uses-sdk", {"android:minSdkVersion": min_sdk, "android:targetSdkVersion": target_sdk}),
                Element("application", {"android:hasCode": False}),
            ),
        )
    )
