plugins {
    id("com.android.ai-pack")
}

// Play takes AI packs of up to 1.5 GB each and 4 GB in all; they stand in the app's assets after installation.
aiPack {
    packName.set("modelpack")
    dynamicDelivery {
        deliveryType.set("install-time")
    }
}
