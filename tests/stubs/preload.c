/* Makes an ordinary llama-server use ggml_card.cpp; by LD_PRELOAD, and harmless in any other program.
 *
 * A build with CUDA has its card from the start. The build of the tests has none, and would look at
 * GGML_BACKEND_PATH only where `--device` names a card: here it looks before `main`.
 *
 * With NVML_STUB_NO_DATA, files are mapped without being read: the models have no data.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

__attribute__((constructor)) static void load_backends(void)
{
    void (*load_all)(void) = (void (*)(void))dlsym(RTLD_DEFAULT, "ggml_backend_load_all");
    if (load_all && getenv("GGML_BACKEND_PATH"))
        load_all();
}

void *mmap(void *address, size_t length, int protection, int flags, int file, off_t offset)
{
    if (getenv("NVML_STUB_NO_DATA"))
        flags &= ~MAP_POPULATE;
    return (void *)syscall(SYS_mmap, address, length, protection, flags, file, offset);
}

int posix_madvise(void *address, size_t length, int advice)
{
    if (getenv("NVML_STUB_NO_DATA") && advice == POSIX_MADV_WILLNEED)
        return 0;
    return madvise(address, length, advice) == 0 ? 0 : errno;
}
