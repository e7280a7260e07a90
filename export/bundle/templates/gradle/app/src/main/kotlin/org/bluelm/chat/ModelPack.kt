package org.bluelm.chat

import android.content.Context
import android.content.res.AssetManager
import android.os.Build
import android.system.Os
import java.io.File
import java.io.InputStream
import java.nio.ByteBuffer
import java.nio.channels.FileChannel
import java.nio.charset.StandardCharsets
import java.security.MessageDigest
import org.json.JSONObject

/** The model that a bundle carries: from the app's own assets, or from an installed model pack (APK). */
class ModelPack(private val context: Context) {
    private val assets: AssetManager
    private val home: String
    private val folder: File
    val manifest: JSONObject
    val artifact: JSONObject

    init {
        val own = context.assets.list("model")?.contains("manifest.json") == true
        home = if (own) "model/" else ""
        assets = if (own) context.assets else installedPack(context)
        val raw = read("manifest.json")
        manifest = JSONObject(String(raw, StandardCharsets.UTF_8))
        folder = File(context.filesDir, "model/" + hex(MessageDigest.getInstance("SHA-256").digest(raw)))
        folder.parentFile?.listFiles()?.filter { it != folder }?.forEach { it.deleteRecursively() } // of older models
        artifact = json("artifact/artifact.json")
    }

    private fun installedPack(context: Context): AssetManager {
        val found = context.packageManager.getInstalledPackages(0).firstOrNull { info ->
            val other = context.createPackageContext(info.packageName, 0).assets
            other.list("")?.contains("manifest.json") == true && other.list("")?.contains("model.sig") == true
        } ?: throw IllegalStateException("no model: neither in this app nor as an installed model pack")
        return context.createPackageContext(found.packageName, 0).assets
    }

    private fun hex(digest: ByteArray) = digest.joinToString("") { "%02x".format(it) }

    private fun json(path: String) = JSONObject(String(read(path), StandardCharsets.UTF_8))

    fun read(path: String): ByteArray = assets.open(home + path).use { it.readBytes() }

    /** Why this phone cannot run the model, or null. */
    fun objection(): String? {
        val needs = manifest.getJSONObject("requirements")
        if (needs.isNull("soc") || Build.VERSION.SDK_INT < 31) return null
        val wanted = needs.getString("soc")
        return if (Build.SOC_MODEL.equals(wanted, true)) null else "made for $wanted, this is ${Build.SOC_MODEL}"
    }

    /** A file of the artifact's role, mapped into memory. */
    fun map(path: String): ByteBuffer {
        val file = file(path)
        return file.inputStream().channel.use { it.map(FileChannel.MapMode.READ_ONLY, 0, file.length()) }
    }

    /**
     * A file of the payload on disk; runtimes want paths. Copied once, checked against manifest.json. All files of
     * a model lie as in its payload, so that graphs find their weights beside them.
     */
    fun file(path: String): File {
        val entry = manifest.getJSONObject("files").getJSONObject(path)
        val target = File(folder, path)
        if (target.length() == entry.getLong("bytes") && target.exists()) return target
        target.parentFile?.mkdirs()
        val partial = File(target.path + ".part")
        val digest = MessageDigest.getInstance("SHA-256")
        partial.outputStream().use { out ->
            for (part in parts(path, entry)) {
                part.use { input ->
                    val buffer = ByteArray(1 shl 20)
                    while (true) {
                        val count = input.read(buffer)
                        if (count < 0) break
                        digest.update(buffer, 0, count)
                        out.write(buffer, 0, count)
                    }
                }
            }
        }
        check(hex(digest.digest()) == entry.getString("sha256")) { "$path was changed: refused" }
        check(partial.renameTo(target)) { "$target cannot be written" }
        return target
    }

    /** A folder of the payload on disk, whole. */
    fun folder(path: String): File {
        for (name in manifest.getJSONObject("files").keys()) if (name.startsWith("$path/")) file(name)
        return File(folder, path)
    }

    /** The pieces of a file that was cut for split APKs, in order; else the file itself. */
    private fun parts(path: String, entry: JSONObject): List<InputStream> {
        val pieces = entry.getJSONArray("pieces")
        if (pieces.length() == 0) return listOf(assets.open(home + path))
        return (0 until pieces.length()).map {
            assets.open(pieces.getJSONObject(it).getString("entry").removePrefix("assets/"))
        }
    }

    /** A native library of this app, which Gradle left on disk. */
    fun library(name: String) = File(context.applicationInfo.nativeLibraryDir, name)

    /** Qualcomm's DSP loads its part of QNN from these folders; told before QNN begins. */
    fun showHexagonLibraries() {
        val own = context.applicationInfo.nativeLibraryDir
        Os.setenv("ADSP_LIBRARY_PATH", "$own;/vendor/lib/rfsa/adsp;/vendor/dsp/cdsp;/system/lib/rfsa/adsp;/dsp", true)
    }

    /** Path in the payload of the artifact's file with a role. */
    fun path(role: String): String = paths(role).firstOrNull()
        ?: throw IllegalStateException("the artifact has no $role file")

    fun paths(role: String): List<String> {
        val files = artifact.getJSONArray("files")
        return (0 until files.length()).map { files.getJSONObject(it) }
            .filter { it.getString("role") == role }
            .map { "artifact/" + it.getString("path") }
    }

    /** The first of these tokenizer files that the model has. */
    fun tokenizer(vararg names: String): String {
        val files = manifest.getJSONObject("tokenizer").getJSONArray("files")
        val paths = (0 until files.length()).map { files.getString(it) }
        return names.mapNotNull { name -> paths.firstOrNull { it.endsWith("/$name") } }.firstOrNull()
            ?: throw IllegalStateException("the model has no ${names.joinToString(" and no ")}")
    }
}
