/* A stand-in for NVIDIA's libnvidia-ml.so.1 that answers from a scenario file, so that everything above NVML runs without a GPU.
 *
 * PASCALINE_FAKE_NVML names the file; README.md beside this file describes its lines. The file is read again whenever it changes,
 * so a test injects and clears faults in a running process. Structures and error codes are those of NVML's public API; only calls
 * listed in FUNCTIONS below exist, as in an old driver that lacks the rest. Build: cc -shared -fPIC (see __init__.py).
 */
#include <ctype.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MAX_GPUS 64
#define MAX_ENTRIES 4096
#define KEY_BYTES 96
#define VALUE_BYTES 1024
#define LIBRARY (-1)
#define EVERY_GPU (-2)
#define NOT_AVAILABLE (~0ull)

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, TIMEOUT = 10, UNKNOWN = 999 };

static const struct { const char *name; int code; } ERRORS[] = {
    {"UNINITIALIZED", 1}, {"INVALID_ARGUMENT", 2}, {"NOT_SUPPORTED", 3}, {"NO_PERMISSION", 4}, {"NOT_FOUND", 6},
    {"INSUFFICIENT_SIZE", 7}, {"INSUFFICIENT_POWER", 8}, {"DRIVER_NOT_LOADED", 9}, {"TIMEOUT", 10}, {"IRQ_ISSUE", 11},
    {"LIBRARY_NOT_FOUND", 12}, {"FUNCTION_NOT_FOUND", 13}, {"CORRUPTED_INFOROM", 14}, {"GPU_IS_LOST", 15},
    {"RESET_REQUIRED", 16}, {"OPERATING_SYSTEM", 17}, {"LIB_RM_VERSION_MISMATCH", 18}, {"IN_USE", 19}, {"MEMORY", 20},
    {"NO_DATA", 21}, {"VGPU_ECC_NOT_SUPPORTED", 22}, {"INSUFFICIENT_RESOURCES", 23}, {"FREQ_NOT_SUPPORTED", 24},
    {"ARGUMENT_VERSION_MISMATCH", 25}, {"DEPRECATED", 26}, {"NOT_READY", 27}, {"GPU_NOT_FOUND", 28}, {"INVALID_STATE", 29},
    {"UNKNOWN", 999},
};

/* ---- What exists. A call is a line of one list; its C function and its place among the known names follow from that. ---- */

#define STRINGS(X) X(nvmlDeviceGetName) X(nvmlDeviceGetUUID) X(nvmlDeviceGetSerial) X(nvmlDeviceGetVbiosVersion) \
    X(nvmlDeviceGetBoardPartNumber)
#define UINTS(X) X(nvmlDeviceGetMinorNumber) X(nvmlDeviceGetPowerUsage) X(nvmlDeviceGetEnforcedPowerLimit) \
    X(nvmlDeviceGetPowerManagementLimit) X(nvmlDeviceGetPowerManagementDefaultLimit) X(nvmlDeviceGetPerformanceState) \
    X(nvmlDeviceGetPowerState) X(nvmlDeviceGetFanSpeed) X(nvmlDeviceGetNumFans) X(nvmlDeviceGetCurrPcieLinkGeneration) \
    X(nvmlDeviceGetCurrPcieLinkWidth) X(nvmlDeviceGetMaxPcieLinkGeneration) X(nvmlDeviceGetMaxPcieLinkWidth) \
    X(nvmlDeviceGetPcieReplayCounter) X(nvmlDeviceGetRetiredPagesPendingStatus) X(nvmlDeviceGetPersistenceMode) \
    X(nvmlDeviceGetComputeMode) X(nvmlDeviceGetVirtualizationMode) X(nvmlDeviceGetDisplayMode) X(nvmlDeviceGetDisplayActive) \
    X(nvmlDeviceGetBoardId) X(nvmlDeviceGetMultiGpuBoard) X(nvmlDeviceGetArchitecture) X(nvmlDeviceGetBrand) \
    X(nvmlDeviceGetMemoryBusWidth) X(nvmlDeviceGetNumGpuCores)
#define ULLONGS(X) X(nvmlDeviceGetTotalEnergyConsumption) X(nvmlDeviceGetCurrentClocksThrottleReasons) \
    X(nvmlDeviceGetSupportedClocksThrottleReasons) X(nvmlDeviceGetSupportedEventTypes)
#define SPLIT_PAIRS(X) X(nvmlDeviceGetCudaComputeCapability) X(nvmlDeviceGetPowerManagementLimitConstraints) \
    X(nvmlDeviceGetEccMode) X(nvmlDeviceGetMigMode) X(nvmlDeviceGetEncoderUtilization) X(nvmlDeviceGetDecoderUtilization)
#define UINTS_BY_KIND(X) X(nvmlDeviceGetTemperature) X(nvmlDeviceGetTemperatureThreshold) X(nvmlDeviceGetClockInfo) \
    X(nvmlDeviceGetMaxClockInfo) X(nvmlDeviceGetApplicationsClock) X(nvmlDeviceGetDefaultApplicationsClock) \
    X(nvmlDeviceGetPcieThroughput)
#define OTHERS(X) X(nvmlInit) X(nvmlSystemGetDriverVersion) X(nvmlSystemGetNVMLVersion) X(nvmlSystemGetCudaDriverVersion) \
    X(nvmlSystemGetProcessName) X(nvmlDeviceGetCount) X(nvmlDeviceGetHandleByIndex) X(nvmlDeviceGetMemoryInfo) \
    X(nvmlDeviceGetMemoryInfo_v2) X(nvmlDeviceGetPciInfo) X(nvmlDeviceGetUtilizationRates) X(nvmlDeviceGetTotalEccErrors) X(nvmlDeviceGetMemoryErrorCounter) \
    X(nvmlDeviceGetRetiredPages) X(nvmlDeviceGetRemappedRows) X(nvmlDeviceGetComputeRunningProcesses) \
    X(nvmlDeviceGetGraphicsRunningProcesses) X(nvmlDeviceGetFieldValues) X(nvmlDeviceRegisterEvents) X(nvmlEventSetWait) \
    X(all) X(xid)
#define FUNCTIONS(X) STRINGS(X) UINTS(X) ULLONGS(X) SPLIT_PAIRS(X) UINTS_BY_KIND(X) OTHERS(X)

#define QUOTED(name) #name,
static const char *const KNOWN[] = {FUNCTIONS(QUOTED) NULL};

/* ---- The scenario file ---- */

typedef struct { int gpu; double at; char key[KEY_BYTES]; char value[VALUE_BYTES]; } Entry;
typedef struct { Entry *entries; int count; int gpus; } Scenario;
typedef struct { int index; } Device;
typedef struct { double since; unsigned generation; int next; unsigned char wants[MAX_GPUS]; } EventSet;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Scenario scenario;
static unsigned generation;         /* grows each time another content was read */
static struct timespec written;     /* the file's modification time: zero of its `at` times */
static ino_t inode;
static off_t size;
static int initialised;
static Device devices[MAX_GPUS];

static double seconds(struct timespec t) { return (double)t.tv_sec + t.tv_nsec * 1e-9; }
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return seconds(t);
}

static char *trimmed(char *text) {
    while (isspace((unsigned char)*text)) text++;
    char *end = text + strlen(text);
    while (end > text && isspace((unsigned char)end[-1])) *--end = 0;
    return text;
}

static int known(const char *key) {
    size_t length = strcspn(key, " ");
    for (int i = 0; KNOWN[i]; i++)
        if (strlen(KNOWN[i]) == length && !strncmp(KNOWN[i], key, length)) return 1;
    return 0;
}

/* "[library]", "[gpu 0]", "[gpu *]", each with an optional "at SECONDS" after it. */
static const char *parse_heading(char *text, int *gpu, double *at, int *gpus) {
    char which[16], extra[16];
    *at = 0;
    if (!strcmp(text, "[library]")) return *gpu = LIBRARY, NULL;
    if (sscanf(text, "[library at %lf%15s", at, extra) == 2) return *gpu = LIBRARY, NULL;
    int fields = sscanf(text, "[gpu %15[0-9*] at %lf%15s", which, at, extra);
    if (fields != 3 && !(fields == 1 && text[strlen(text) - 1] == ']'))
        return "a heading is [library], [gpu N] or [gpu *], with \"at SECONDS\" if it holds later";
    if (!strcmp(which, "*")) return *gpu = EVERY_GPU, NULL;
    *gpu = atoi(which);
    if (*gpu >= MAX_GPUS) return "at most 64 GPUs";
    if (*gpu >= *gpus) *gpus = *gpu + 1;
    return NULL;
}

static const char *parse_line(Scenario *into, char *text, int *gpu, double *at) {
    if (!*text || *text == '#') return NULL;
    if (*text == '[') return parse_heading(text, gpu, at, &into->gpus);
    char *equals = strchr(text, '=');
    if (!equals) return "expected NAME = VALUE";
    *equals = 0;
    char *key = trimmed(text), *value = trimmed(equals + 1);
    if (!known(key)) return "no such NVML call here";
    if (!strcmp(key, "xid") && *gpu < 0) return "xid belongs below [gpu N]";
    if (strlen(key) >= KEY_BYTES || strlen(value) >= VALUE_BYTES) return "too long";
    if (into->count == MAX_ENTRIES) return "too many lines";
    Entry *entry = &into->entries[into->count++];
    entry->gpu = *gpu;
    entry->at = *at;
    strcpy(entry->key, key);
    strcpy(entry->value, value);
    return NULL;
}

static int parse(FILE *file, const char *path, Scenario *into) {
    char line[VALUE_BYTES + KEY_BYTES + 8];
    int gpu = LIBRARY, number = 0;
    double at = 0;
    while (fgets(line, sizeof line, file)) {
        number++;
        const char *wrong = parse_line(into, trimmed(line), &gpu, &at);
        if (!wrong) continue;
        fprintf(stderr, "fake NVML: %s:%d: %s\n", path, number, wrong);
        return 0;
    }
    return 1;
}

/* Reads the file if it is another one than last time. A file with a mistake leaves the last good content in force. */
static void refresh(void) {
    const char *path = getenv("PASCALINE_FAKE_NVML");
    struct stat status;
    if (!path || stat(path, &status)) return;
    int same = status.st_mtim.tv_sec == written.tv_sec && status.st_mtim.tv_nsec == written.tv_nsec && status.st_ino == inode &&
               status.st_size == size;
    if (same) return;
    FILE *file = fopen(path, "r");
    if (!file) return;
    written = status.st_mtim;
    inode = status.st_ino;
    size = status.st_size;
    Scenario fresh = {calloc(MAX_ENTRIES, sizeof(Entry)), 0, 0};
    if (fresh.entries && parse(file, path, &fresh)) {
        Entry *exact = realloc(fresh.entries, (size_t)(fresh.count + 1) * sizeof(Entry));
        if (exact) fresh.entries = exact;
        free(scenario.entries);
        scenario = fresh;
        generation++;
    } else {
        free(fresh.entries);
    }
    fclose(file);
}

/* The line in force: one for this GPU before one for every GPU, among those the later. */
static const Entry *find(int gpu, const char *key) {
    const Entry *best = NULL;
    double age = now() - seconds(written);
    for (int i = 0; i < scenario.count; i++) {
        const Entry *entry = &scenario.entries[i];
        if (entry->gpu != gpu && !(gpu >= 0 && entry->gpu == EVERY_GPU)) continue;
        if (entry->at > age || strcmp(entry->key, key)) continue;
        if (!best || entry->gpu == gpu || best->gpu != gpu) best = entry;
    }
    return best;
}

static int error_code(const char *name) {
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (!strcmp(ERRORS[i].name, name)) return ERRORS[i].code;
    return isdigit((unsigned char)*name) ? atoi(name) : UNKNOWN;
}

static void pause_for(double duration) {
    struct timespec rest = {(time_t)duration, (long)((duration - (double)(time_t)duration) * 1e9)};
    while (nanosleep(&rest, &rest) && errno == EINTR) {}
}

/* Acts out "hang", "crash", "error NAME" and "slow SECONDS ..."; leaves in `value` what is to be returned. */
static int act(char *value) {
    double delay;
    int used;
    if (!strcmp(value, "hang"))
        for (;;) pause();
    if (!strcmp(value, "crash")) abort();
    if (sscanf(value, "slow %lf %n", &delay, &used) == 1) {
        pause_for(delay);
        memmove(value, value + used, strlen(value + used) + 1);
        return act(value);
    }
    return strncmp(value, "error ", 6) ? OK : error_code(value + 6);
}

/* The answer to one call: its text in `value`, or an error code. `all` of the library or of the GPU comes before the call's own line. */
static int answer(int gpu, const char *key, char value[VALUE_BYTES]) {
    pthread_mutex_lock(&lock);
    refresh();
    const Entry *entry = find(LIBRARY, "all");
    if (!entry && gpu >= 0) entry = find(gpu, "all");
    if (!entry) entry = find(gpu, key);
    strcpy(value, entry ? entry->value : "error NOT_SUPPORTED");
    int ready = initialised || !strcmp(key, "nvmlInit");
    pthread_mutex_unlock(&lock);
    return ready ? act(value) : UNINITIALIZED;
}

/* ---- Numbers: plain, wave(LOW,HIGH,PERIOD) and count(START,PER_SECOND), several separated by spaces ---- */

static double wave(double low, double high, double period) {
    double phase = now() / period;
    phase -= (double)(long long)phase;
    return low + (high - low) * (phase < 0.5 ? 2 * phase : 2 - 2 * phase);
}

static unsigned long long number(const char *text) {
    double a, b, c;
    if (sscanf(text, "wave(%lf,%lf,%lf)", &a, &b, &c) == 3) return (unsigned long long)(wave(a, b, c) + 0.5);
    if (sscanf(text, "count(%lf,%lf)", &a, &b) == 2) return (unsigned long long)(a + b * (now() - seconds(written)));
    return strtoull(text, NULL, 0);
}

static int numbers(int gpu, const char *key, unsigned long long *out, int count) {
    char value[VALUE_BYTES], *rest;
    int code = answer(gpu, key, value);
    if (code) return code;
    char *token = strtok_r(value, " ", &rest);
    for (int i = 0; i < count; i++, token = strtok_r(NULL, " ", &rest)) {
        if (!token) return UNKNOWN;
        out[i] = number(token);
    }
    return OK;
}

static int index_of(const void *handle) {
    const Device *device = handle;
    return device >= devices && device < devices + MAX_GPUS ? (int)(device - devices) : -1;
}

static int text_answer(int gpu, const char *key, char *out, unsigned length) {
    char value[VALUE_BYTES];
    int code = answer(gpu, key, value);
    if (code) return code;
    if (strlen(value) + 1 > length) return INSUFFICIENT_SIZE;
    strcpy(out, value);
    return OK;
}

/* ---- The library ---- */

int nvmlInit_v2(void) {
    char value[VALUE_BYTES];
    int code = answer(LIBRARY, "nvmlInit", value);
    if (code == NOT_SUPPORTED) code = scenario.entries ? OK : UNKNOWN; /* no line: it works, if there is a scenario at all */
    if (!code) initialised = 1;
    return code;
}
int nvmlInit(void) { return nvmlInit_v2(); }
int nvmlInitWithFlags(unsigned flags) { return (void)flags, nvmlInit_v2(); }
int nvmlShutdown(void) { return initialised = 0, OK; }

const char *nvmlErrorString(int code) {
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == code) return ERRORS[i].name;
    return code ? "UNKNOWN" : "SUCCESS";
}

int nvmlSystemGetDriverVersion(char *out, unsigned length) { return text_answer(LIBRARY, __func__, out, length); }
int nvmlSystemGetNVMLVersion(char *out, unsigned length) { return text_answer(LIBRARY, __func__, out, length); }
int nvmlSystemGetCudaDriverVersion(int *out) {
    unsigned long long value;
    int code = numbers(LIBRARY, "nvmlSystemGetCudaDriverVersion", &value, 1);
    if (!code) *out = (int)value;
    return code;
}
int nvmlSystemGetCudaDriverVersion_v2(int *out) { return nvmlSystemGetCudaDriverVersion(out); }
int nvmlSystemGetProcessName(unsigned pid, char *out, unsigned length) {
    (void)pid;
    return text_answer(LIBRARY, __func__, out, length);
}

int nvmlDeviceGetCount_v2(unsigned *out) {
    unsigned long long value = 0;
    int code = numbers(LIBRARY, "nvmlDeviceGetCount", &value, 1);
    if (code == NOT_SUPPORTED) code = OK, value = (unsigned long long)scenario.gpus;
    if (!code) *out = (unsigned)value;
    return code;
}
int nvmlDeviceGetCount(unsigned *out) { return nvmlDeviceGetCount_v2(out); }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    char value[VALUE_BYTES];
    unsigned count;
    int code = nvmlDeviceGetCount_v2(&count);
    if (code) return code;
    if (index >= count || index >= MAX_GPUS) return INVALID_ARGUMENT;
    code = answer((int)index, "nvmlDeviceGetHandleByIndex", value);
    if (code && code != NOT_SUPPORTED) return code;
    *out = &devices[index];
    return OK;
}
int nvmlDeviceGetHandleByIndex(unsigned index, void **out) { return nvmlDeviceGetHandleByIndex_v2(index, out); }
int nvmlDeviceGetIndex(void *handle, unsigned *out) {
    int gpu = index_of(handle);
    if (gpu < 0) return INVALID_ARGUMENT;
    *out = (unsigned)gpu;
    return OK;
}

/* ---- One shape a macro ---- */

#define STRING(name) \
    int name(void *handle, char *out, unsigned length) { return text_answer(index_of(handle), #name, out, length); }
STRINGS(STRING)

#define UINT(name) \
    int name(void *handle, unsigned *out) { \
        unsigned long long value; \
        int code = numbers(index_of(handle), #name, &value, 1); \
        if (!code) *out = (unsigned)value; \
        return code; \
    }
UINTS(UINT)

#define ULLONG(name) \
    int name(void *handle, unsigned long long *out) { return numbers(index_of(handle), #name, out, 1); }
ULLONGS(ULLONG)

#define SPLIT_PAIR(name) \
    int name(void *handle, unsigned *first, unsigned *second) { \
        unsigned long long value[2]; \
        int code = numbers(index_of(handle), #name, value, 2); \
        if (!code) *first = (unsigned)value[0], *second = (unsigned)value[1]; \
        return code; \
    }
SPLIT_PAIRS(SPLIT_PAIR)

#define UINT_BY_KIND(name) \
    int name(void *handle, unsigned kind, unsigned *out) { \
        char key[KEY_BYTES]; \
        unsigned long long value; \
        snprintf(key, sizeof key, #name " %u", kind); \
        int code = numbers(index_of(handle), key, &value, 1); \
        if (!code) *out = (unsigned)value; \
        return code; \
    }
UINTS_BY_KIND(UINT_BY_KIND)

/* ---- Calls with a shape of their own ---- */

int nvmlDeviceGetUtilizationRates(void *handle, unsigned out[2]) {
    unsigned long long value[2];
    int code = numbers(index_of(handle), __func__, value, 2);
    if (!code) out[0] = (unsigned)value[0], out[1] = (unsigned)value[1];
    return code;
}

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory_v2;

int nvmlDeviceGetMemoryInfo_v2(void *handle, Memory_v2 *out) {
    unsigned long long value[4]; /* total, reserved, free, used */
    int code = numbers(index_of(handle), __func__, value, 4);
    if (code) return code;
    out->total = value[0], out->reserved = value[1], out->free = value[2], out->used = value[3];
    return OK;
}
int nvmlDeviceGetMemoryInfo(void *handle, Memory *out) {
    unsigned long long value[3]; /* total, free, used */
    int code = numbers(index_of(handle), __func__, value, 3);
    if (code) return code;
    out->total = value[0], out->free = value[1], out->used = value[2];
    return OK;
}

typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} PciInfo;

int nvmlDeviceGetPciInfo_v3(void *handle, PciInfo *out) {
    char value[VALUE_BYTES]; /* 00000000:3B:00.0 [DEVICE_ID [SUBSYSTEM_ID]] */
    int code = answer(index_of(handle), "nvmlDeviceGetPciInfo", value);
    if (code) return code;
    memset(out, 0, sizeof *out);
    int fields = sscanf(value, "%x:%x:%x.0 %x %x", &out->domain, &out->bus, &out->device, &out->device_id, &out->subsystem_id);
    if (fields < 3) return UNKNOWN;
    snprintf(out->bus_id, sizeof out->bus_id, "%08X:%02X:%02X.0", out->domain, out->bus & 0xff, out->device & 0xff);
    snprintf(out->bus_id_legacy, sizeof out->bus_id_legacy, "%04X:%02X:%02X.0", out->domain & 0xffff, out->bus & 0xff, out->device & 0xff);
    return OK;
}
int nvmlDeviceGetPciInfo_v2(void *handle, PciInfo *out) { return nvmlDeviceGetPciInfo_v3(handle, out); }
int nvmlDeviceGetPciInfo(void *handle, PciInfo *out) { return nvmlDeviceGetPciInfo_v3(handle, out); }

int nvmlDeviceGetCurrentClocksEventReasons(void *handle, unsigned long long *out) {
    return nvmlDeviceGetCurrentClocksThrottleReasons(handle, out);
}
int nvmlDeviceGetSupportedClocksEventReasons(void *handle, unsigned long long *out) {
    return nvmlDeviceGetSupportedClocksThrottleReasons(handle, out);
}

int nvmlDeviceGetTotalEccErrors(void *handle, unsigned error, unsigned counter, unsigned long long *out) {
    char key[KEY_BYTES];
    snprintf(key, sizeof key, "nvmlDeviceGetTotalEccErrors %u %u", error, counter);
    return numbers(index_of(handle), key, out, 1);
}
int nvmlDeviceGetMemoryErrorCounter(void *handle, unsigned error, unsigned counter, unsigned location, unsigned long long *out) {
    char key[KEY_BYTES];
    snprintf(key, sizeof key, "nvmlDeviceGetMemoryErrorCounter %u %u %u", error, counter, location);
    return numbers(index_of(handle), key, out, 1);
}

int nvmlDeviceGetRemappedRows(void *handle, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    unsigned long long value[4];
    int code = numbers(index_of(handle), __func__, value, 4);
    if (code) return code;
    *corrected = (unsigned)value[0], *uncorrected = (unsigned)value[1], *pending = (unsigned)value[2], *failed = (unsigned)value[3];
    return OK;
}

/* Splits a list by spaces. NVML's way with lists: a buffer that is too small gets the count that is needed. */
static int listed(int gpu, const char *key, char value[VALUE_BYTES], char *items[], unsigned *count, const void *out) {
    int code = answer(gpu, key, value);
    if (code) return code;
    unsigned found = 0;
    char *rest, *token = strtok_r(value, " ", &rest);
    for (; token && found < VALUE_BYTES / 2; token = strtok_r(NULL, " ", &rest)) items[found++] = token;
    int fits = found <= *count && (out || !found);
    *count = found;
    return fits ? OK : INSUFFICIENT_SIZE;
}

int nvmlDeviceGetRetiredPages(void *handle, unsigned cause, unsigned *count, unsigned long long *out) {
    char key[KEY_BYTES], value[VALUE_BYTES], *items[VALUE_BYTES / 2];
    snprintf(key, sizeof key, "nvmlDeviceGetRetiredPages %u", cause);
    int code = listed(index_of(handle), key, value, items, count, out);
    for (unsigned i = 0; !code && i < *count; i++) out[i] = strtoull(items[i], NULL, 0);
    return code;
}

typedef struct { unsigned pid; unsigned long long used; } Process;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } Process_v2;

/* "PID:BYTES", or "PID:-" where the driver does not tell the bytes. */
static unsigned long long process_bytes(const char *item, unsigned *pid) {
    char *end;
    *pid = (unsigned)strtoul(item, &end, 10);
    return *end == ':' && end[1] != '-' ? number(end + 1) : NOT_AVAILABLE;
}

static int processes(void *handle, const char *key, unsigned *count, Process *old, Process_v2 *out) {
    char value[VALUE_BYTES], *items[VALUE_BYTES / 2];
    int code = listed(index_of(handle), key, value, items, count, old ? (void *)old : (void *)out);
    for (unsigned i = 0; !code && i < *count; i++) {
        unsigned pid;
        unsigned long long used = process_bytes(items[i], &pid);
        if (old) old[i] = (Process){pid, used};
        else out[i] = (Process_v2){pid, used, ~0u, ~0u};
    }
    return code;
}

#define PROCESSES(name) \
    int name(void *handle, unsigned *count, Process *out) { return processes(handle, #name, count, out, NULL); } \
    int name##_v2(void *handle, unsigned *count, Process_v2 *out) { return processes(handle, #name, count, NULL, out); } \
    int name##_v3(void *handle, unsigned *count, Process_v2 *out) { return processes(handle, #name, count, NULL, out); }
PROCESSES(nvmlDeviceGetComputeRunningProcesses)
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses)

typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    int type, code;
    unsigned long long value;
} FieldValue;
enum { TYPE_UNSIGNED_LONG_LONG = 3 };

int nvmlDeviceGetFieldValues(void *handle, int count, FieldValue *values) {
    char key[KEY_BYTES];
    for (int i = 0; i < count; i++) {
        snprintf(key, sizeof key, "nvmlDeviceGetFieldValues %u", values[i].field);
        values[i].type = TYPE_UNSIGNED_LONG_LONG;
        values[i].timestamp = (long long)(now() * 1e6);
        values[i].code = numbers(index_of(handle), key, &values[i].value, 1);
    }
    return OK;
}

/* ---- Events: each `xid` line is one, at its `at` time after the file was written, seen by sets that were registered before ---- */

typedef struct { void *device; unsigned long long type, data; unsigned gpu_instance, compute_instance; } EventData;
enum { XID_EVENT = 8, POLL_MS = 20 };

int nvmlEventSetCreate(EventSet **out) {
    *out = calloc(1, sizeof **out);
    (*out)->since = now();
    return OK;
}
int nvmlEventSetFree(EventSet *set) { return free(set), OK; }

int nvmlDeviceRegisterEvents(void *handle, unsigned long long types, EventSet *set) {
    char value[VALUE_BYTES];
    int gpu = index_of(handle), code = answer(gpu, __func__, value);
    if (code && code != NOT_SUPPORTED) return code;
    if (gpu < 0) return INVALID_ARGUMENT;
    if (types & XID_EVENT) set->wants[gpu] = 1;
    return OK;
}

static int next_event(EventSet *set, EventData *out) {
    refresh();
    if (set->generation != generation) set->generation = generation, set->next = 0;
    for (; set->next < scenario.count; set->next++) {
        const Entry *entry = &scenario.entries[set->next];
        double time = seconds(written) + entry->at;
        if (strcmp(entry->key, "xid") || !set->wants[entry->gpu] || time < set->since) continue;
        if (time > now()) return 0;
        *out = (EventData){&devices[entry->gpu], XID_EVENT, number(entry->value), ~0u, ~0u};
        set->next++;
        return 1;
    }
    return 0;
}

int nvmlEventSetWait_v2(EventSet *set, EventData *out, unsigned timeout_ms) {
    double deadline = now() + timeout_ms / 1000.0;
    for (;;) {
        char value[VALUE_BYTES];
        int code = answer(LIBRARY, "nvmlEventSetWait", value);
        if (code && code != NOT_SUPPORTED) return code;
        pthread_mutex_lock(&lock);
        int found = next_event(set, out);
        pthread_mutex_unlock(&lock);
        if (found) return OK;
        if (now() >= deadline) return TIMEOUT;
        pause_for(POLL_MS / 1000.0);
    }
}
int nvmlEventSetWait(EventSet *set, EventData *out, unsigned timeout_ms) { return nvmlEventSetWait_v2(set, out, timeout_ms); }
