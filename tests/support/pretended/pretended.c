/* Lets every process below see another NVIDIA card than the one it runs on. LD_PRELOAD; __init__.py builds and describes it.
 *
 * Readings are changed, code is not: CUDA's own loader asks the driver itself, by none of the functions here, and keeps
 * running the code of the real card. Four doors are changed: the functions of libcudart that torch and bitsandbytes link,
 * those of libcuda that Python asks by ctypes, NVML for everybody, and the driver's folder in /proc.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define CALLER __builtin_return_address(0)

enum { CUDA_OUT_OF_MEMORY = 2, NVML_NOT_SUPPORTED = 3, NVML_INSUFFICIENT_SIZE = 7, CUBLAS_NOT_SUPPORTED = 15 };
/* cudaDeviceAttr and CUdevice_attribute have the same numbers. */
enum { CLOCK = 13, MULTIPROCESSORS = 16, MEMORY_CLOCK = 36, L2_BYTES = 38, MAJOR = 75, MINOR = 76, SHARED_PER_MULTIPROCESSOR = 81,
       SHARED_OPT_IN = 97, PERSISTING_L2 = 108 };
/* cudaDataType_t; 28 and above are 8 bits and less of floating point. */
enum { REAL_32F = 0, REAL_8I = 3, REAL_16BF = 14, COMPLEX_16BF = 15, FIRST_FP8 = 28 };
enum { FAST_16F = 74, FAST_16BF = 75, FAST_TF32 = 77, TF32_MATH = 3 };

static long number(const char *name) {
    const char *text = getenv(name);
    return text ? strtol(text, NULL, 10) : 0;
}

#define CARD(name) number("STAND_IN_CARD_" #name)

static void *next_dlsym(void *handle, const char *name) {
    static void *(*real)(void *, const char *);
    if (!real) real = (void *(*)(void *, const char *))dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34");
    if (!real) real = (void *(*)(void *, const char *))dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5");
    return real(handle, name);
}

/* The function of the library that the caller links: there may be several libcudart in one process. */
static void *linked(void *caller, const char *name) {
    Dl_info info;
    void *found = NULL;
    if (dladdr(caller, &info) && info.dli_fname) {
        void *library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
        if (library) found = next_dlsym(library, name), dlclose(library);
    }
    if (!found) found = next_dlsym(RTLD_NEXT, name);
    if (!found) fprintf(stderr, "pretended card: no %s behind %s\n", name, info.dli_fname), abort();
    return found;
}

#define REAL(result, name, ...) ((result(*)(__VA_ARGS__))linked(CALLER, #name))

/* --- memory: a process' own blocks, and the ledger of all processes of one card ------------------------------------- */

#define BLOCKS 65536
static struct { uintptr_t at; size_t bytes; } blocks[BLOCKS];
static size_t held;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* The file that STAND_IN_CARD_LEDGER names: a process that computes and what it holds, in bytes; pid 0 is free. */
#define SLOTS 512
struct slot { int64_t pid, held; };
static struct slot *mine;
static pid_t owner;

static int real_open(const char *path, int flags, mode_t mode);

static struct slot *ledger(void) {
    static struct slot *slots;
    const char *path = getenv("STAND_IN_CARD_LEDGER");
    if (slots || !path) return slots;
    int file = real_open(path, O_RDWR | O_CLOEXEC, 0);
    if (file < 0) return NULL;
    size_t bytes = SLOTS * sizeof(struct slot);
    void *page = ftruncate(file, bytes) ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return slots = page == MAP_FAILED ? NULL : page;
}

/* Whether a process runs; one that ended and was not waited for does not. */
static int runs(pid_t pid) {
    char path[64], text[512], *after;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int file = real_open(path, O_RDONLY | O_CLOEXEC, 0);
    if (file < 0) return 0;
    ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    text[size > 0 ? size : 0] = 0;
    after = strrchr(text, ')');
    return after && after[1] && after[2] != 'Z' && after[2] != 'X';
}

/* Enter this process, under the lock. A child of fork holds nothing of its parent's. */
static void enter(void) {
    if (owner == getpid()) return;
    if (owner) memset(blocks, 0, sizeof blocks), held = 0;
    owner = getpid(), mine = NULL;
    struct slot *slots = ledger();
    for (size_t i = 0; slots && !mine && i < SLOTS; i++) {
        int64_t was = slots[i].pid;
        if (was && was != owner && runs(was)) continue;
        if (__sync_bool_compare_and_swap(&slots[i].pid, was, owner)) mine = slots + i, mine->held = 0;
    }
}

__attribute__((destructor)) static void leave(void) {
    if (mine && owner == getpid()) mine->pid = 0;
}

static void holds(ssize_t more) {
    held += more;
    if (mine) mine->held = held;
}

static size_t used_by(const struct slot *each) {
    return each->pid && runs(each->pid) ? each->held + CARD(CONTEXT_BYTES) : 0;
}

/* What all processes hold that the ledger names. */
static size_t used_together(void) {
    size_t sum = 0;
    for (struct slot *first = ledger(), *each = first; first && each < first + SLOTS; each++) sum += used_by(each);
    return sum;
}

/* What this process may still take, under the lock and after `enter`. */
static size_t room(void) {
    size_t used = mine ? used_together() : held + CARD(CONTEXT_BYTES), total = CARD(BYTES);
    return used < total ? total - used : 0;
}

static void keep(uintptr_t at, size_t bytes) {
    for (size_t i = at / 512 % BLOCKS, tries = 0; tries < BLOCKS; i = (i + 1) % BLOCKS, tries++)
        if (!blocks[i].bytes) { blocks[i].at = at; blocks[i].bytes = bytes; holds(bytes); return; }
}

static void forget(uintptr_t at) {
    for (size_t i = at / 512 % BLOCKS, tries = 0; tries < BLOCKS; i = (i + 1) % BLOCKS, tries++)
        if (blocks[i].bytes && blocks[i].at == at) { holds(-(ssize_t)blocks[i].bytes); blocks[i].bytes = 0; return; }
}

static int allocate(int (*real)(void *, size_t), void *pointer, size_t bytes) {
    pthread_mutex_lock(&lock);
    enter();
    int code = bytes > room() ? CUDA_OUT_OF_MEMORY : real(pointer, bytes);
    if (!code && bytes) keep(*(uintptr_t *)pointer, bytes);
    pthread_mutex_unlock(&lock);
    return code;
}

EXPORT int cudaMalloc(void **pointer, size_t bytes) {
    return allocate((int (*)(void *, size_t))linked(CALLER, "cudaMalloc"), pointer, bytes);
}

EXPORT int cudaFree(void *pointer) {
    int code = REAL(int, cudaFree, void *)(pointer);
    pthread_mutex_lock(&lock);
    if (!code && pointer) forget((uintptr_t)pointer);
    pthread_mutex_unlock(&lock);
    return code;
}

static int memory(int code, size_t *free, size_t *total) {
    if (code) return code;
    pthread_mutex_lock(&lock);
    enter();
    if (*free > room()) *free = room();
    *total = CARD(BYTES);
    pthread_mutex_unlock(&lock);
    return 0;
}

EXPORT int cudaMemGetInfo(size_t *free, size_t *total) {
    return memory(REAL(int, cudaMemGetInfo, size_t *, size_t *)(free, total), free, total);
}

/* --- what the runtime says of a device ------------------------------------------------------------------------------ */

static int attribute(int code, int *value, int which) {
    if (code) return code;
    if (which == MAJOR) *value = CARD(MAJOR);
    if (which == MINOR) *value = CARD(MINOR);
    if (which == MULTIPROCESSORS) *value = CARD(MULTIPROCESSORS);
    if (which == L2_BYTES) *value = CARD(L2_BYTES);
    if (which == SHARED_PER_MULTIPROCESSOR) *value = CARD(SHARED_BYTES);
    if (which == SHARED_OPT_IN) *value = 49152;
    if (which == PERSISTING_L2) *value = 0;
    if (which == CLOCK) *value = CARD(CLOCK_KHZ);
    return 0;
}

EXPORT int cudaDeviceGetAttribute(int *value, int which, int device) {
    return attribute(REAL(int, cudaDeviceGetAttribute, int *, int, int)(value, which, device), value, which);
}

/* The first fields of cudaDeviceProp are at the same place since CUDA 11; later ones are found by their value. */
enum { NAME_BYTES = 256, AT_TOTAL = 288, AT_MAJOR = 360, AT_MINOR = 364, AT_LATER = 384, AT_END = 800 };

static void replace_value(char *properties, int from, int old, int new) {
    for (int at = from; old != new && at < AT_END; at += 4)
        if (*(int *)(properties + at) == old) { *(int *)(properties + at) = new; return; }
}

static int describe(void *caller, const char *name, void *properties, int device) {
    int code = ((int (*)(void *, int))linked(caller, name))(properties, device);
    int (*ask)(int *, int, int) = (int (*)(int *, int, int))linked(caller, "cudaDeviceGetAttribute");
    if (code) return code;
    for (const int *which = (const int[]){MULTIPROCESSORS, SHARED_OPT_IN, SHARED_PER_MULTIPROCESSOR, L2_BYTES, PERSISTING_L2, 0};
         *which; which++) {
        int old = 0, new = 0;
        if (ask(&old, *which, device) || attribute(0, &new, *which)) continue;
        if (old) replace_value(properties, AT_LATER, old, new);
    }
    snprintf(properties, NAME_BYTES, "%s", getenv("STAND_IN_CARD_NAME"));
    *(size_t *)((char *)properties + AT_TOTAL) = CARD(BYTES);
    *(int *)((char *)properties + AT_MAJOR) = CARD(MAJOR);
    *(int *)((char *)properties + AT_MINOR) = CARD(MINOR);
    return 0;
}

EXPORT int cudaGetDeviceProperties(void *properties, int device) {
    return describe(CALLER, "cudaGetDeviceProperties", properties, device);
}

EXPORT int cudaGetDeviceProperties_v2(void *properties, int device) {
    return describe(CALLER, "cudaGetDeviceProperties_v2", properties, device);
}

/* --- what Pascal cannot compute -------------------------------------------------------------------------------------- */

/* Tell Python, which knows who asked: the function `refused` of the module pretended_card. */
static void refuse(const char *what) {
    int (*ensure)(void) = (int (*)(void))next_dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
    void (*release)(int) = (void (*)(int))next_dlsym(RTLD_DEFAULT, "PyGILState_Release");
    void *(*import)(const char *) = (void *(*)(const char *))next_dlsym(RTLD_DEFAULT, "PyImport_ImportModule");
    void *(*call)(void *, const char *, const char *, ...) =
        (void *(*)(void *, const char *, const char *, ...))next_dlsym(RTLD_DEFAULT, "PyObject_CallMethod");
    if (!ensure || !release || !import || !call) { fprintf(stderr, "pretended card: %s\n", what); return; }
    int state = ensure();
    void *module = import("pretended_card");
    if (module) call(module, "refused", "s", what);
    release(state);
}

static int needs_newer(int type) { return type == REAL_16BF || type == COMPLEX_16BF || type >= FIRST_FP8; }

static int is_refused(const char *function, int type, int compute) {
    char text[160];
    const char *why = needs_newer(type) ? (type >= FIRST_FP8 ? "a product of 8-bit floating point" : "a bfloat16 product")
                      : compute == FAST_16F || compute == FAST_16BF || compute == FAST_TF32 ? "a tensor-core product" : NULL;
    if (!why) return 0;
    snprintf(text, sizeof text, "%s by %s (data type %d, compute type %d)", why, function, type, compute);
    refuse(text);
    return 1;
}

EXPORT int cublasSetMathMode(void *handle, int mode) {
    if ((mode & 15) == TF32_MATH) { refuse("TF32 products by cublasSetMathMode"); return CUBLAS_NOT_SUPPORTED; }
    return REAL(int, cublasSetMathMode, void *, int)(handle, mode);
}

EXPORT int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int at, int lda,
                        const void *b, int bt, int ldb, const void *beta, void *c, int ct, int ldc, int compute, int algo) {
    if (is_refused("cublasGemmEx", at, compute)) return CUBLAS_NOT_SUPPORTED;
    return REAL(int, cublasGemmEx, void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int, int,
                const void *, void *, int, int, int, int)(h, ta, tb, m, n, k, alpha, a, at, lda, b, bt, ldb, beta, c, ct, ldc,
                                                          compute, algo);
}

EXPORT int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int at,
                                      int lda, long long sa, const void *b, int bt, int ldb, long long sb, const void *beta,
                                      void *c, int ct, int ldc, long long sc, int count, int compute, int algo) {
    if (is_refused("cublasGemmStridedBatchedEx", at, compute)) return CUBLAS_NOT_SUPPORTED;
    return REAL(int, cublasGemmStridedBatchedEx, void *, int, int, int, int, int, const void *, const void *, int, int, long long,
                const void *, int, int, long long, const void *, void *, int, int, long long, int, int, int)(
        h, ta, tb, m, n, k, alpha, a, at, lda, sa, b, bt, ldb, sb, beta, c, ct, ldc, sc, count, compute, algo);
}

EXPORT int cublasLtMatmulDescCreate(void *descriptor, int compute, int scale) {
    if (is_refused("cublasLtMatmul", scale, compute)) return CUBLAS_NOT_SUPPORTED;
    return REAL(int, cublasLtMatmulDescCreate, void *, int, int)(descriptor, compute, scale);
}

EXPORT int cublasLtMatrixLayoutCreate(void *layout, int type, uint64_t rows, uint64_t columns, int64_t ld) {
    if (type == REAL_8I) { refuse("a tensor-core product of int8 by cublasLtMatmul"); return CUBLAS_NOT_SUPPORTED; }
    if (is_refused("cublasLtMatmul", type, 0)) return CUBLAS_NOT_SUPPORTED;
    return REAL(int, cublasLtMatrixLayoutCreate, void *, int, uint64_t, uint64_t, int64_t)(layout, type, rows, columns, ld);
}

EXPORT int cudnnBackendExecute(void *handle, void *plan, void *pack) {
    (void)handle, (void)plan, (void)pack;
    refuse("a call of cuDNN");
    return 3000; /* CUDNN_STATUS_NOT_SUPPORTED */
}

/* --- libcuda by ctypes, NVML ----------------------------------------------------------------------------------------- */

static void *real_of(void *ours);

#define WRAPPED(result, name, ...) ((result(*)(__VA_ARGS__))real_of((void *)name))

static int my_cuDeviceGetAttribute(int *value, int which, int device) {
    return attribute(WRAPPED(int, my_cuDeviceGetAttribute, int *, int, int)(value, which, device), value, which);
}

static int my_cuDeviceComputeCapability(int *major, int *minor, int device) {
    int code = WRAPPED(int, my_cuDeviceComputeCapability, int *, int *, int)(major, minor, device);
    return code ? code : (*major = CARD(MAJOR), *minor = CARD(MINOR), 0);
}

static int my_cuDeviceGetName(char *name, int size, int device) {
    int code = WRAPPED(int, my_cuDeviceGetName, char *, int, int)(name, size, device);
    if (!code) snprintf(name, size, "%s", getenv("STAND_IN_CARD_NAME"));
    return code;
}

static int my_cuDeviceTotalMem(size_t *bytes, int device) {
    int code = WRAPPED(int, my_cuDeviceTotalMem, size_t *, int)(bytes, device);
    return code ? code : (*bytes = CARD(BYTES), 0);
}

static int my_cuMemGetInfo(size_t *free, size_t *total) {
    return memory(WRAPPED(int, my_cuMemGetInfo, size_t *, size_t *)(free, total), free, total);
}

static int my_cuMemAlloc(void *pointer, size_t bytes) {
    return allocate(WRAPPED(int, my_cuMemAlloc, void *, size_t), pointer, bytes);
}

static int my_cuMemFree(uintptr_t pointer) {
    int code = WRAPPED(int, my_cuMemFree, uintptr_t)(pointer);
    pthread_mutex_lock(&lock);
    if (!code) forget(pointer);
    pthread_mutex_unlock(&lock);
    return code;
}

static int my_nvmlDeviceGetName(void *device, char *name, unsigned size) {
    int code = WRAPPED(int, my_nvmlDeviceGetName, void *, char *, unsigned)(device, name, size);
    if (code) return code;
    return snprintf(name, size, "%s", getenv("STAND_IN_CARD_NAME")) < (int)size ? 0 : NVML_INSUFFICIENT_SIZE;
}

static void shrink(unsigned long long *total, unsigned long long *free, unsigned long long *used) {
    *total = CARD(BYTES);
    if (ledger()) *used = used_together();
    if (*used > *total) *used = *total;
    *free = *total - *used;
}

static int my_nvmlDeviceGetMemoryInfo(void *device, unsigned long long *info) { /* total, free, used */
    int code = WRAPPED(int, my_nvmlDeviceGetMemoryInfo, void *, unsigned long long *)(device, info);
    if (!code) shrink(info, info + 1, info + 2);
    return code;
}

static int my_nvmlDeviceGetMemoryInfo_v2(void *device, unsigned long long *info) { /* version, total, reserved, free, used */
    int code = WRAPPED(int, my_nvmlDeviceGetMemoryInfo_v2, void *, unsigned long long *)(device, info);
    if (!code) info[2] = 0, shrink(info + 1, info + 3, info + 4);
    return code;
}

static int my_nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    int code = WRAPPED(int, my_nvmlDeviceGetCudaComputeCapability, void *, int *, int *)(device, major, minor);
    return code ? code : (*major = CARD(MAJOR), *minor = CARD(MINOR), 0);
}

static int my_nvmlDeviceGetNumGpuCores(void *device, unsigned *cores) {
    int code = WRAPPED(int, my_nvmlDeviceGetNumGpuCores, void *, unsigned *)(device, cores);
    return code ? code : (*cores = CARD(CORES), 0);
}

static int my_nvmlDeviceGetArchitecture(void *device, unsigned *architecture) {
    int code = WRAPPED(int, my_nvmlDeviceGetArchitecture, void *, unsigned *)(device, architecture);
    return code ? code : (*architecture = 4, 0); /* NVML_DEVICE_ARCH_PASCAL */
}

static int my_nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    (void)device, (void)current, (void)pending;
    return NVML_NOT_SUPPORTED;
}

/* Of the processes on the real card, those of the ledger. An entry is `bytes` long and begins with pid and memory. */
static void only_ours(unsigned *count, char *entries, size_t bytes) {
    struct slot *slots = ledger();
    unsigned kept = 0;
    for (unsigned i = 0; slots && i < *count; i++) {
        char *entry = entries + i * bytes;
        for (struct slot *each = slots; each < slots + SLOTS; each++)
            if (each->pid == *(unsigned *)entry && used_by(each)) {
                memmove(entries + kept * bytes, entry, bytes);
                *(unsigned long long *)(entries + kept++ * bytes + 8) = used_by(each);
                break;
            }
    }
    if (slots) *count = kept;
}

#define PROCESSES(name, bytes)                                                                                      \
    static int my_##name(void *device, unsigned *count, char *entries) {                                            \
        int code = WRAPPED(int, my_##name, void *, unsigned *, char *)(device, count, entries);                     \
        if (!code && entries) only_ours(count, entries, bytes);                                                     \
        return code;                                                                                                \
    }
PROCESSES(nvmlDeviceGetComputeRunningProcesses, 16)
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, 24)
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, 24)

static struct { const char *name; void *ours, *real; } wrapped[] = {
    {"cuDeviceGetAttribute", my_cuDeviceGetAttribute, 0},
    {"cuDeviceComputeCapability", my_cuDeviceComputeCapability, 0},
    {"cuDeviceGetName", my_cuDeviceGetName, 0},
    {"cuDeviceTotalMem_v2", my_cuDeviceTotalMem, 0},
    {"cuMemGetInfo_v2", my_cuMemGetInfo, 0},
    {"cuMemAlloc_v2", my_cuMemAlloc, 0},
    {"cuMemFree_v2", my_cuMemFree, 0},
    {"nvmlDeviceGetName", my_nvmlDeviceGetName, 0},
    {"nvmlDeviceGetMemoryInfo", my_nvmlDeviceGetMemoryInfo, 0},
    {"nvmlDeviceGetMemoryInfo_v2", my_nvmlDeviceGetMemoryInfo_v2, 0},
    {"nvmlDeviceGetCudaComputeCapability", my_nvmlDeviceGetCudaComputeCapability, 0},
    {"nvmlDeviceGetNumGpuCores", my_nvmlDeviceGetNumGpuCores, 0},
    {"nvmlDeviceGetArchitecture", my_nvmlDeviceGetArchitecture, 0},
    {"nvmlDeviceGetMigMode", my_nvmlDeviceGetMigMode, 0},
    {"nvmlDeviceGetComputeRunningProcesses", my_nvmlDeviceGetComputeRunningProcesses, 0},
    {"nvmlDeviceGetComputeRunningProcesses_v2", my_nvmlDeviceGetComputeRunningProcesses_v2, 0},
    {"nvmlDeviceGetComputeRunningProcesses_v3", my_nvmlDeviceGetComputeRunningProcesses_v3, 0},
    {NULL, NULL, NULL},
};

static void *real_of(void *ours) {
    int i = 0;
    while (wrapped[i].ours != ours) i++;
    return wrapped[i].real;
}

/* CUDA's own libraries must learn what the card is; of libcuda only Python's ctypes is told another one. */
static int is_python(void *caller) {
    Dl_info info;
    if (!dladdr(caller, &info) || !info.dli_fname) return 0;
    const char *name = strrchr(info.dli_fname, '/');
    name = name ? name + 1 : info.dli_fname;
    return !strncmp(name, "_ctypes", 7) || !strncmp(name, "python", 6) || !strncmp(name, "libpython", 9);
}

EXPORT void *dlsym(void *restrict handle, const char *restrict name) {
    if (!strncmp(name, "nvmlDevice", 10) || !strncmp(name, "cu", 2))
        for (int i = 0; wrapped[i].name; i++)
            if (!strcmp(name, wrapped[i].name) && (name[0] == 'n' || is_python(CALLER))) {
                void *real = next_dlsym(handle, name);
                if (!real) return NULL;
                wrapped[i].real = real;
                return wrapped[i].ours;
            }
    return next_dlsym(handle, name);
}

/* --- /proc/driver/nvidia: gpus/ADDRESS/information, and version: only the closed module drives Pascal ------------------ */

static int changed(int file, int is_version) {
    char text[4096], *open_module;
    ssize_t size = read(file, text, sizeof text - 1);
    int copy = memfd_create("nvidia", MFD_CLOEXEC);
    text[size > 0 ? size : 0] = 0;
    close(file);
    for (char *line = text, *end; *line; line = end) {
        end = strchrnul(line, '\n');
        if (*end) end++;
        if (is_version && (open_module = strstr(line, "Open Kernel Module for ")) && open_module < end)
            dprintf(copy, "%.*sx86_64 Kernel Module%.*s", (int)(open_module - line), line, (int)(end - open_module - 29),
                    open_module + 29);
        else if (!is_version && !strncmp(line, "Model:", 6))
            dprintf(copy, "Model: \t\t %s\n", getenv("STAND_IN_CARD_NAME"));
        else dprintf(copy, "%.*s", (int)(end - line), line);
    }
    lseek(copy, 0, SEEK_SET);
    return copy;
}

static int real_open(const char *path, int flags, mode_t mode) {
    static int (*real)(const char *, int, ...);
    if (!real) real = (int (*)(const char *, int, ...))next_dlsym(RTLD_NEXT, "open64");
    return real(path, flags, mode);
}

static int opened(const char *path, int flags, mode_t mode) {
    int file = real_open(path, flags, mode);
    const char *folder = getenv("STAND_IN_CARD_PROC_GPUS"), *rest;
    if (file < 0 || !path || !folder) return file;
    size_t above = strrchr(folder, '/') - folder + 1;
    if (!strncmp(path, folder, above) && !strcmp(path + above, "version")) return changed(file, 1);
    rest = strncmp(path, folder, strlen(folder)) ? NULL : strstr(path, "/information");
    return rest ? changed(file, 0) : file;
}

EXPORT int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened(path, flags, mode);
}

EXPORT int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened(path, flags, mode);
}
