"""APK archives, their binary manifest and signatures."""
