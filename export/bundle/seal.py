"""The seal of an iOS app's resources: _CodeSignature/CodeResources, and the app's Info.plist."""

from __future__ import annotations

import plistlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.bundle.manifest import BundleManifest

SEAL = "_CodeSignature/CodeResources"
_OMIT = ("Info.plist", "PkgInfo")  # not in files2: bound elsewhere, or of no weight

# Apple's default rules for an iOS app (codesign writes the same for every app).
_RULES: dict[str, Any] = {
    "^.*": True,
    r"^.*\.lproj/": {"optional": True, "weight": 1000.0},
    r"^.*\.lproj/locversion.plist$": {"omit": True, "weight": 1100.0},
    r"^Base\.lproj/": {"weight": 1010.0},
    "^version.plist$": True,
}
_RULES2: dict[str, Any] = {
    r".*\.dSYM($|/)": {"weight": 11.0},
    r"^(.*/)?\.DS_Store$": {"omit": True, "weight": 2000.0},
    "^.*": True,
    r"^.*\.lproj/": {"optional": True, "weight": 1000.0},
    r"^.*\.lproj/locversion.plist$": {"omit": True, "weight": 1100.0},
    r"^Base\.lproj/": {"weight": 1010.0},
    r"^Info\.plist$": {"omit": True, "weight": 20.0},
    r"^PkgInfo$": {"omit": True, "weight": 20.0},
    r"^embedded\.provisionprofile$": {"weight": 20.0},
    r"^version\.plist$": {"weight": 20.0},
}


@dataclass(frozen=True)
class Sealed:
    """Digests of one resource."""

    sha1: bytes
    sha256: bytes


def code_resources(files: Mapping[str, Sealed]) -> bytes:
    """CodeResources over every file of the app but its executable and this one."""
    new = {path: {"hash2": sealed.sha256} for path, sealed in files.items() if path not in _OMIT}
    content = {
        "files": {path: sealed.sha1 for path, sealed in files.items()},
        "files2": new,
        "rules": _RULES,
        "rules2": _RULES2,
    }
    return plistlib.dumps(content, fmt=plistlib.FMT_XML, sort_keys=True)


def info_plist(manifest: BundleManifest, executable: str) -> bytes:
    """Info.plist of our own runner app, binary."""
    application = manifest.application
    content = {
        "CFBundleDevelopmentRegion": "en",
        "CFBundleDisplayName": application.label,
        "CFBundleExecutable": executable,
        "CFBundleIdentifier": application.id,
        "CFBundleInfoDictionaryVersion": "6.0",
        "CFBundleName": application.label,
        "CFBundlePackageType": "APPL",
        "CFBundleShortVersionString": application.version_name,
        "CFBundleSupportedPlatforms": ["iPhoneOS"],
        "CFBundleVersion": str(application.version_code),
        "LSRequiresIPhoneOS": True,
        "MinimumOSVersion": manifest.requirements.min_os,
        "UIDeviceFamily": [1, 2],
        "UILaunchScreen": {},
        "UIRequiredDeviceCapabilities": ["arm64"],
    }
    return plistlib.dumps(content, fmt=plistlib.FMT_BINARY, sort_keys=True)
