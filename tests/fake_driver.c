/* A CUDA driver that does nothing: two devices, and every call succeeds.
 *
 * With it in place of libcuda.so.1, the host side of the CUDA target runs on a machine without a
 * GPU: what a call costs can be measured, and what the driver was asked for is counted
 * (fake_count). Memory is host memory, so that copies to and from the device work; kernels are not
 * run.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef void *Handle;
typedef unsigned long long Pointer;

enum { DEVICES = 2 };
enum { LAUNCHES, LAUNCHES_ON_1, SYNCHRONIZATIONS, ALLOCATIONS, EVENTS, COUNTS };
static int contexts[DEVICES], streams[64], event, pool;
static __thread int current = -1; /* the device whose context is this thread's */
static long counts[COUNTS], created;
static Pointer second, second_end; /* what lies there is on the second device */

static void count(int what) { __sync_fetch_and_add(&counts[what], 1); }
static int device_of(Handle context) { return context ? (int)((int *)context - contexts) : -1; }

long fake_count(int what) { return counts[what]; }
void fake_place(Pointer start, size_t bytes) { second = start; second_end = start + bytes; }

static int told(const char *name, int otherwise) { const char *is = getenv(name); return is ? atoi(is) : otherwise; }

Result cuInit(unsigned flags) { return told("FAKE_INIT", 0); }
Result cuDriverGetVersion(int *version) { *version = told("FAKE_VERSION", 13000); return 0; }
Result cuDeviceGetCount(int *count) { *count = told("FAKE_DEVICES", DEVICES); return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Result cuDeviceGetName(char *name, int size, int device) { strncpy(name, "fake GPU", size); return 0; }
Result cuDeviceGetUuid(char *uuid, int device) { memset(uuid, 1, 16); return 0; }
Result cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, 1, 16); return 0; }
Result cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 80ull << 30; return 0; }

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) { /* of an H100 */
    case 1: case 2: case 3: *value = 1024; break; /* threads a block */
    case 4: *value = 64; break;
    case 5: *value = 2147483647; break; /* grid */
    case 6: case 7: *value = 65535; break;
    case 8: *value = 49152; break; /* shared memory a block */
    case 10: *value = 32; break;   /* warp */
    case 12: *value = 65536; break; /* registers */
    case 16: *value = 132; break;   /* multiprocessors */
    case 39: *value = 2048; break;  /* threads a multiprocessor */
    case 75: *value = 9; break;     /* compute capability */
    case 76: *value = 0; break;
    case 81: *value = 233472; break;
    case 97: *value = 232448; break; /* shared memory a block may ask for */
    default: *value = 1;
  }
  return 0;
}

Result cuDevicePrimaryCtxRetain(Handle *out, int device) { *out = &contexts[device]; return 0; }
Result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
Result cuCtxGetCurrent(Handle *out) { *out = current < 0 ? 0 : &contexts[current]; return 0; }
Result cuCtxSetCurrent(Handle in) { current = device_of(in); return 0; }
Result cuCtxPushCurrent_v2(Handle in) { current = device_of(in); return 0; }
Result cuCtxPopCurrent_v2(Handle *out) { return cuCtxGetCurrent(out); }
Result cuCtxGetDevice(int *device) { *device = current < 0 ? 0 : current; return current < 0 ? 201 : 0; }
Result cuCtxGetDevice_v2(int *device, Handle in) { *device = device_of(in); return 0; }
Result cuCtxGetApiVersion(Handle in, unsigned *version) { *version = 13000; return 0; }
Result cuCtxGetId(Handle in, unsigned long long *id) { *id = 1; return 0; }
Result cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
Result cuCtxSynchronize(void) { count(SYNCHRONIZATIONS); return 0; }

Result cuMemGetInfo_v2(size_t *unused, size_t *total) { *unused = *total = 80ull << 30; return 0; }
Result cuMemAlloc_v2(Pointer *out, size_t bytes) { count(ALLOCATIONS); *out = (Pointer)(uintptr_t)aligned_alloc(512, (bytes + 511) / 512 * 512); return 0; }
Result cuMemFree_v2(Pointer in) { free((void *)(uintptr_t)in); return 0; }
Result cuMemAllocAsync(Pointer *out, size_t bytes, Handle on) { return cuMemAlloc_v2(out, bytes); }
Result cuMemAllocFromPoolAsync(Pointer *out, size_t bytes, Handle from, Handle on) { return cuMemAlloc_v2(out, bytes); }
Result cuMemFreeAsync(Pointer in, Handle on) { return cuMemFree_v2(in); }
Result cuMemcpyHtoD_v2(Pointer to, const void *from, size_t bytes) { memcpy((void *)(uintptr_t)to, from, bytes); count(SYNCHRONIZATIONS); return 0; }
Result cuMemcpyDtoH_v2(void *to, Pointer from, size_t bytes) { memcpy(to, (void *)(uintptr_t)from, bytes); count(SYNCHRONIZATIONS); return 0; }
Result cuMemcpyHtoDAsync_v2(Pointer to, const void *from, size_t bytes, Handle on) { memcpy((void *)(uintptr_t)to, from, bytes); return 0; }
Result cuMemcpyDtoHAsync_v2(void *to, Pointer from, size_t bytes, Handle on) { memcpy(to, (void *)(uintptr_t)from, bytes); return 0; }
Result cuMemcpyAsync(Pointer to, Pointer from, size_t bytes, Handle on) { memcpy((void *)(uintptr_t)to, (void *)(uintptr_t)from, bytes); return 0; }
Result cuMemsetD8_v2(Pointer to, unsigned char value, size_t bytes) { memset((void *)(uintptr_t)to, value, bytes); return 0; }
Result cuMemsetD8Async(Pointer to, unsigned char value, size_t bytes, Handle on) { memset((void *)(uintptr_t)to, value, bytes); return 0; }
Result cuDeviceGetDefaultMemPool(Handle *out, int device) { *out = &pool; return 0; }
Result cuDeviceGetMemPool(Handle *out, int device) { *out = &pool; return 0; }
Result cuMemPoolGetAttribute(Handle in, int attribute, void *value) { memset(value, 0, 8); return 0; }
Result cuPointerGetAttribute(void *value, int attribute, Pointer in) {
  switch (attribute) {
    case 1: *(Handle *)value = &contexts[in >= second && in < second_end]; break;
    case 2: *(unsigned *)value = 2; break; /* device memory */
    case 3: *(Pointer *)value = in; break;
    case 9: *(int *)value = in >= second && in < second_end; break; /* the device */
    default: *(unsigned *)value = 0;
  }
  return 0;
}
Result cuPointerGetAttributes(unsigned count, int *attributes, void **values, Pointer in) {
  for (unsigned i = 0; i < count; i++) cuPointerGetAttribute(values[i], attributes[i], in);
  return 0;
}
Result cuMemGetAddressRange_v2(Pointer *base, size_t *size, Pointer in) { if (base) *base = in; if (size) *size = 1 << 20; return 0; }

Result cuLibraryLoadData(Handle *out, const void *code, void *a, void *b, unsigned n, void *c, void *d, unsigned m) { *out = malloc(8); return 0; }
Result cuLibraryGetKernel(Handle *out, Handle in, const char *name) { *out = malloc(8); return 0; }
Result cuKernelGetLibrary(Handle *out, Handle in) { *out = malloc(8); return 0; }
Result cuKernelGetAttribute(int *value, int attribute, Handle in, int device) { *value = attribute ? 32 : 1024; return 0; }
Result cuModuleLoadDataEx(Handle *out, const void *code, unsigned n, void *a, void *b) { *out = malloc(8); return 0; }
Result cuModuleGetFunction(Handle *out, Handle in, const char *name) { *out = malloc(8); return 0; }
Result cuFuncGetAttribute(int *value, int attribute, Handle in) { *value = attribute ? 32 : 1024; return 0; }

Result cuStreamCreateWithPriority(Handle *out, unsigned flags, int priority) { *out = &streams[__sync_fetch_and_add(&created, 1) % 64]; return 0; }
Result cuStreamCreate(Handle *out, unsigned flags) { return cuStreamCreateWithPriority(out, flags, 0); }
Result cuStreamGetCtx(Handle in, Handle *out) { return cuCtxGetCurrent(out); }
Result cuStreamGetCtx_v2(Handle in, Handle *out, Handle *green) { if (green) *green = 0; return cuCtxGetCurrent(out); }
Result cuStreamGetDevice(Handle in, int *device) { return cuCtxGetDevice(device); }
Result cuStreamIsCapturing(Handle in, int *status) { *status = 0; return 0; }
Result cuStreamSynchronize(Handle in) { count(SYNCHRONIZATIONS); return 0; }
Result cuEventCreate(Handle *out, unsigned flags) { count(EVENTS); *out = &event; return 0; }
Result cuEventSynchronize(Handle in) { count(SYNCHRONIZATIONS); return 0; }
Result cuGetErrorName(Result error, const char **out) { *out = "FAKE"; return 0; }
Result cuGetErrorString(Result error, const char **out) { *out = "fake"; return 0; }

/* The last launch: grid, block, shared memory, cluster; what a block of the last kernel may ask for;
 * per cent of shared memory that it had better have. */
static int last[6];
int fake_last(int what) { return last[what]; }
typedef struct { int id; int unused; unsigned value[16]; } Attribute;
typedef struct { unsigned grid[3], block[3], shared; Handle on; Attribute *attributes; unsigned count; } Config;
static void note(const Config *config) {
  last[0] = config->grid[0], last[1] = config->block[0], last[2] = config->shared, last[3] = 1;
  for (unsigned i = 0; i < config->count; i++)
    if (config->attributes[i].id == 4) last[3] = config->attributes[i].value[0]; /* cluster */
}
Result cuKernelSetAttribute(int attribute, int value, Handle kernel, int device) { if (attribute == 8 || attribute == 9) last[attribute - 4] = value; return 0; }

static Result launched(void) { count(LAUNCHES); if (current == 1) count(LAUNCHES_ON_1); return current < 0 ? 201 : 0; }
Result cuLaunchKernelEx(const Config *config, Handle kernel, void **arguments, void **extra) { note(config); return launched(); }
Result cuLaunchKernel(Handle kernel, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f, unsigned shared, Handle on, void **arguments, void **extra) {
  Config config = {{a, b, c}, {d, e, f}, shared, on, 0, 0};
  note(&config);
  return launched();
}

static Result success(void) { return 0; }

/* The newest version of a function that is written here, else one that just succeeds. */
Result cuGetProcAddress_v2(const char *name, Handle *out, int version, uint64_t flags, int *status) {
  static Handle self;
  static const char *unversioned[] = {"cuDeviceGetUuid", "cuStreamGetCtx", "cuCtxGetDevice"};
  char versioned[160];
  Handle found = 0;
  int plain = 0;
  if (!self) {
    Dl_info info;
    dladdr((Handle)cuInit, &info);
    self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }
  for (int i = 0; i < 3; i++) plain |= !strcmp(name, unversioned[i]);
  snprintf(versioned, sizeof versioned, "%s_v2", name);
  if (!plain) found = dlsym(self, versioned);
  if (!found) found = dlsym(self, name);
  *out = found ? found : (Handle)success;
  if (status) *status = 0;
  return 0;
}
Result cuGetProcAddress(const char *name, Handle *out, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, out, version, flags, 0);
}
