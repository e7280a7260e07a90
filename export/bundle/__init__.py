"""Bundles that can be installed, verified and traced: APK, IPA, Xcode and Gradle projects, signed folders."""
