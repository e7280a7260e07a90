/* A TCG plugin for QEMU's user mode: counts guest instructions between marks that the guest sets.
 *
 * A guest sets mark k (1 to 4095) with close(-(1000 + k)), which the kernel refuses (EBADF) and which costs
 * nothing else. At each mark the plugin writes "mark K INSTRUCTIONS" to the file given as `out=PATH`: all
 * instructions so far, of all threads.
 *
 * QEMU ships no header for plugins in Debian, so the few functions used are declared here as its documentation
 * gives them (docs/devel/tcg-plugins, API version 1 and later). Build with -DAPI_VERSION=1 (QEMU 6 to 8) or 2.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_CB_R_REGS, QEMU_PLUGIN_CB_RW_REGS };

typedef void (*tb_translated)(qemu_plugin_id_t id, struct qemu_plugin_tb *tb);
typedef void (*tb_executed)(unsigned int vcpu, void *userdata);
typedef void (*syscalled)(qemu_plugin_id_t id, unsigned int vcpu, int64_t number, uint64_t a1, uint64_t a2,
                          uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8);
typedef void (*exited)(qemu_plugin_id_t id, void *userdata);

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, tb_translated callback);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, tb_executed callback,
                                          enum qemu_plugin_cb_flags flags, void *userdata);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t id, syscalled callback);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, exited callback, void *userdata);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);

__attribute__((visibility("default"))) int qemu_plugin_version = API_VERSION;

enum { CLOSE_ON_ARM64 = 57, FIRST_MARK = 1000, LAST_MARK = 5095 };

static uint64_t count;
static FILE *out;

static void executed(unsigned int vcpu, void *instructions)
{
    (void)vcpu;
    __atomic_fetch_add(&count, (uint64_t)(uintptr_t)instructions, __ATOMIC_RELAXED);
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    (void)id;
    void *instructions = (void *)(uintptr_t)qemu_plugin_tb_n_insns(tb);
    qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, QEMU_PLUGIN_CB_NO_REGS, instructions);
}

static void called(qemu_plugin_id_t id, unsigned int vcpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3,
                   uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    (void)id, (void)vcpu, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    int32_t descriptor = (int32_t)a1;
    if (number == CLOSE_ON_ARM64 && descriptor < -FIRST_MARK && descriptor >= -LAST_MARK) {
        fprintf(out, "mark %d %llu\n", -descriptor - FIRST_MARK, (unsigned long long)count);
        fflush(out);
    }
}

static void ended(qemu_plugin_id_t id, void *userdata)
{
    (void)id, (void)userdata;
    fprintf(out, "end %llu\n", (unsigned long long)count);
    fclose(out);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc,
                                                              char **argv)
{
    (void)info;
    for (int i = 0; i < argc; i++) {
        if (strncmp(argv[i], "out=", 4) == 0) {
            out = fopen(argv[i] + 4, "w");
        }
    }
    if (!out) {
        fprintf(stderr, "count_instructions: give out=PATH of a file that can be written\n");
        return -1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
