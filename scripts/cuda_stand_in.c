/* What `scripts/cuda_kernels.py` needs of the CUDA runtime. "Device" memory is the host's; every kernel does nothing.
   All functions that are not here are generated and return 0, which is success. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static char handle[64];

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }

/* The first fields of cudaDeviceProp have had the same places since CUDA 12. */
int cudaGetDeviceProperties(char *properties, int device) {
  memset(properties, 0, 700);
  strcpy(properties, "stand-in");
  *(size_t *)(properties + 288) = (size_t)80 << 30; /* totalGlobalMem */
  *(size_t *)(properties + 296) = 48 << 10;         /* sharedMemPerBlock */
  *(int *)(properties + 308) = 32;                  /* warpSize */
  *(int *)(properties + 320) = 1024;                /* maxThreadsPerBlock */
  *(int *)(properties + 324) = *(int *)(properties + 328) = 1024;
  *(int *)(properties + 332) = 64;                  /* maxThreadsDim */
  *(int *)(properties + 336) = 1 << 30;
  *(int *)(properties + 340) = *(int *)(properties + 344) = 65535; /* maxGridSize */
  *(int *)(properties + 360) = MAJOR;
  *(int *)(properties + 364) = MINOR;
  *(int *)(properties + 384) = *(int *)(properties + 388) = 128; /* multiProcessorCount */
  return 0;
}
int cudaGetDeviceProperties_v2(char *properties, int device) { return cudaGetDeviceProperties(properties, device); }

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break;   /* threads of a block */
    case 10: *value = 32; break;    /* threads of a warp */
    case 16: *value = 128; break;   /* multiprocessors */
    case 75: *value = MAJOR; break; /* compute capability */
    case 76: *value = MINOR; break;
    case 97: *value = 99 << 10; break; /* shared memory of a block */
    default: *value = 0;
  }
  return 0;
}

int cudaMalloc(void **memory, size_t bytes) { return posix_memalign(memory, 256, bytes ? bytes : 1) ? 2 : 0; }
int cudaMallocHost(void **memory, size_t bytes) { return cudaMalloc(memory, bytes); }
int cudaHostAlloc(void **memory, size_t bytes, int flags) { return cudaMalloc(memory, bytes); }
int cudaMallocAsync(void **memory, size_t bytes, void *stream) { return cudaMalloc(memory, bytes); }
int cudaMallocFromPoolAsync(void **memory, size_t bytes, void *pool, void *stream) { return cudaMalloc(memory, bytes); }
int cudaFree(void *memory) { free(memory); return 0; }
int cudaFreeHost(void *memory) { free(memory); return 0; }
int cudaFreeAsync(void *memory, void *stream) { free(memory); return 0; }
int cudaMemcpy(void *to, void *from, size_t bytes, int kind) { memcpy(to, from, bytes); return 0; }
int cudaMemcpyAsync(void *to, void *from, size_t bytes, int kind, void *stream) { memcpy(to, from, bytes); return 0; }
int cudaMemset(void *to, int value, size_t bytes) { memset(to, value, bytes); return 0; }
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) { memset(to, value, bytes); return 0; }
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = (size_t)80 << 30; return 0; }
int cudaMemPoolGetAttribute(void *pool, int attribute, size_t *value) { *value = 0; return 0; }
int cudaPointerGetAttributes(char *attributes, void *memory) { memset(attributes, 0, 24); return 0; }

int cudaRuntimeGetVersion(int *version) { *version = RELEASE; return 0; }
int cudaDriverGetVersion(int *version) { *version = RELEASE; return 0; }
const char *cudaGetErrorString(int code) { return "stand-in"; }
const char *cudaGetErrorName(int code) { return "stand-in"; }
int cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags, int *result) {
  *function = 0;
  if (result) *result = 1; /* not found */
  return 0;
}
int cudaGetDriverEntryPointByVersion(const char *n, void **f, unsigned version, unsigned long long flags, int *r) {
  return cudaGetDriverEntryPoint(n, f, flags, r);
}

int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) { *graph = handle; return 0; }
int cudaGraphInstantiate(void **executable) { *executable = handle; return 0; }
int cudaEventElapsedTime(float *milliseconds) { *milliseconds = 0; return 0; }
int cudaFuncGetAttributes(char *attributes) { memset(attributes, 0, 56); return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { *blocks = 1; return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { *blocks = 1; return 0; }
void **__cudaRegisterFatBinary(void *binary) { return (void **)handle; }
