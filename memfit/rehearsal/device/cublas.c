/* cuBLAS, whose products do nothing. The scalars that some functions give back to the host (a dot
   product in the host's pointer mode, the index of a maximum) are not written. torch has them
   written to the device. cublasXt and the API before handles (cublasSgemm) are refused. */
#include <string.h>

#include "libraries.h"
#include "memory.h"

/* What a handle takes of the addresses, beside the workspace that torch gives it: seen on an H100 (see
   addresses.c). Its bytes are in the context's. */
#define HANDLE_BYTES (64 * MIB)

enum { CUBLAS_INVALID_VALUE = 7, CUBLAS_NOT_SUPPORTED = 15 };

/* A name, the name with 64-bit integers, and both for the four types. */
#define X(name) COMPUTES(cublas##name)
#define P(name) COMPUTES(cublas##name) COMPUTES(cublas##name##_64)
#define F(name) X(S##name) X(D##name) X(C##name) X(Z##name)
#define FP(name) P(S##name) P(D##name) P(C##name) P(Z##name)

FP(axpy_v2) FP(copy_v2) FP(dgmm) FP(gbmv_v2) FP(geam) FP(gemmBatched) FP(gemmStridedBatched)
FP(gemm_v2) FP(gemvBatched) FP(gemvStridedBatched) FP(gemv_v2) FP(rot_v2) FP(scal_v2) FP(swap_v2)
FP(symm_v2) FP(symv_v2) FP(syr2_v2) FP(syr2k_v2) FP(syr_v2) FP(syrk_v2) FP(syrkx) FP(tbmv_v2)
FP(tbsv_v2) FP(tpmv_v2) FP(tpsv_v2) FP(trmm_v2) FP(trmv_v2) FP(trsmBatched) FP(trsm_v2) FP(trsv_v2)
 F(getrfBatched) F(getriBatched) F(matinvBatched)
F(rotg_v2) F(tpttr) F(trttp)
P(AsumEx) P(AxpyEx) P(Cdotc_v2) P(Cdotu_v2) P(Cgemm3m) P(Cgemm3mBatched) P(Cgemm3mEx)
P(Cgemm3mStridedBatched) P(CgemmEx) P(Cgerc_v2) P(Cgeru_v2) P(Chbmv_v2) P(Chemm_v2) P(Chemv_v2)
P(Cher2_v2) P(Cher2k_v2) P(Cher_v2) P(Cherk3mEx) P(CherkEx) P(Cherk_v2) P(Cherkx) P(Chpmv_v2)
P(Chpr2_v2) P(Chpr_v2) P(CopyEx) P(Csrot_v2) P(Csscal_v2) P(Csyrk3mEx) P(CsyrkEx) P(Dasum_v2)
P(Ddot_v2) P(DgemmGroupedBatched) P(Dger_v2) P(Dnrm2_v2) P(DotEx) P(DotcEx) P(Drotm_v2) P(Dsbmv_v2)
P(Dspmv_v2) P(Dspr2_v2) P(Dspr_v2) P(Dzasum_v2) P(Dznrm2_v2) P(GemmBatchedEx) P(GemmEx)
P(GemmGroupedBatchedEx) P(GemmStridedBatchedEx) P(HSHgemvBatched) P(HSHgemvStridedBatched)
P(HSSgemvBatched) P(HSSgemvStridedBatched) P(Hgemm) P(HgemmBatched) P(HgemmStridedBatched)
P(IamaxEx) P(IaminEx) P(Icamax_v2) P(Icamin_v2) P(Idamax_v2) P(Idamin_v2) P(Isamax_v2) P(Isamin_v2)
P(Izamax_v2) P(Izamin_v2) P(Nrm2Ex) P(RotEx) P(RotmEx) P(Sasum_v2) P(ScalEx) P(Scasum_v2)
P(Scnrm2_v2) P(Sdot_v2) P(SgemmEx) P(SgemmGroupedBatched) P(Sger_v2) P(Snrm2_v2) P(Srotm_v2)
P(Ssbmv_v2) P(Sspmv_v2) P(Sspr2_v2) P(Sspr_v2) P(SwapEx) P(TSSgemvBatched) P(TSSgemvStridedBatched)
P(TSTgemvBatched) P(TSTgemvStridedBatched) P(Zdotc_v2) P(Zdotu_v2) P(Zdrot_v2) P(Zdscal_v2)
P(Zgemm3m) P(Zgerc_v2) P(Zgeru_v2) P(Zhbmv_v2) P(Zhemm_v2) P(Zhemv_v2) P(Zher2_v2) P(Zher2k_v2)
P(Zher_v2) P(Zherk_v2) P(Zherkx) P(Zhpmv_v2) P(Zhpr2_v2) P(Zhpr_v2)
X(Drotmg_v2) X(RotgEx) X(RotmgEx) X(Srotmg_v2) X(Uint8gemmBias)

/* These tell the host that their arguments were right. */
#define RIGHT(name, k) \
    ANSWERS_INT(cublasS##name, k) ANSWERS_INT(cublasD##name, k) ANSWERS_INT(cublasC##name, k) ANSWERS_INT(cublasZ##name, k)
RIGHT(geqrfBatched, 6) RIGHT(gelsBatched, 9) RIGHT(getrsBatched, 9)

API Status cublasCreate_v2(Handle **handle) {
    Status status = create_handle(handle);
    if (status) return status;
    device_lock();
    (*handle)->held = take_addresses(HANDLE_BYTES, current_device());
    device_unlock();
    return OK;
}
API Status cublasDestroy_v2(Handle *handle) {
    device_lock();
    if (handle->held) give_addresses(handle->held);
    device_unlock();
    return destroy_handle(handle);
}
API Status cublasSetStream_v2(Handle *handle, void *stream) { return set_stream(handle, stream); }
API Status cublasGetStream_v2(const Handle *handle, void **stream) { return get_stream(handle, stream); }
RETURNS(cublasSetWorkspace_v2, OK)

#define SETTING(name, suffix, field) \
    API Status cublasSet##name##suffix(Handle *handle, int value) { handle->field = value; return OK; } \
    API Status cublasGet##name##suffix(const Handle *handle, int *value) { *value = handle->field; return OK; }
SETTING(PointerMode, _v2, pointer_mode)
SETTING(MathMode, , math_mode)
SETTING(AtomicsMode, , atomics_mode)
SETTING(SmCountTarget, , sm_count)
SETTING(EmulationStrategy, , emulation[0])
SETTING(EmulationSpecialValuesSupport, , emulation[1])
SETTING(FixedPointEmulationMantissaControl, , emulation[2])
SETTING(FixedPointEmulationMaxMantissaBitCount, , emulation[3])
SETTING(FixedPointEmulationMantissaBitOffset, , emulation[4])
API Status cublasSetFixedPointEmulationMantissaBitCountPointer(Handle *handle, int *count) {
    handle->mantissa_bits = count;
    return OK;
}
API Status cublasGetFixedPointEmulationMantissaBitCountPointer(const Handle *handle, int **count) {
    *count = handle->mantissa_bits;
    return OK;
}

/* The version of the library that torch brought. */
API Status cublasGetVersion_v2(const Handle *handle UNUSED, int *version) {
    int parts[3] = {0};
    Status (*property)(int, int *);
    *(void **)&property = real_function(cuda_version() >= 13000 ? "libcublas.so.13" : "libcublas.so.12", "cublasGetProperty");
    for (int i = 0; property && i < 3; i++) property(i, &parts[i]);
    *version = parts[0] * 10000 + parts[1] * 100 + parts[2];
    return OK;
}

/* Vectors and matrices between the host and a device. */
static Status copy_vector(int64_t n, int64_t bytes, const void *from, int64_t from_step, void *to, int64_t to_step) {
    if (n < 0 || bytes <= 0 || from_step <= 0 || to_step <= 0) return CUBLAS_INVALID_VALUE;
    if (from_step == 1 && to_step == 1) device_copy(to, from, (size_t)(n * bytes));
    else copy_columns(to, (size_t)(to_step * bytes), from, (size_t)(from_step * bytes), (size_t)bytes, (size_t)n);
    return OK;
}
static Status copy_matrix(int64_t rows, int64_t columns, int64_t bytes, const void *from, int64_t from_step, void *to, int64_t to_step) {
    if (rows < 0 || columns < 0 || bytes <= 0 || from_step < rows || to_step < rows) return CUBLAS_INVALID_VALUE;
    copy_columns(to, (size_t)(to_step * bytes), from, (size_t)(from_step * bytes), (size_t)(rows * bytes), (size_t)columns);
    return OK;
}
#define COPIES(suffix, integer) \
    API Status cublasSetVector##suffix(integer n, integer bytes, const void *x, integer dx, void *y, integer dy) { return copy_vector(n, bytes, x, dx, y, dy); } \
    API Status cublasGetVector##suffix(integer n, integer bytes, const void *x, integer dx, void *y, integer dy) { return copy_vector(n, bytes, x, dx, y, dy); } \
    API Status cublasSetMatrix##suffix(integer m, integer n, integer bytes, const void *a, integer lda, void *b, integer ldb) { return copy_matrix(m, n, bytes, a, lda, b, ldb); } \
    API Status cublasGetMatrix##suffix(integer m, integer n, integer bytes, const void *a, integer lda, void *b, integer ldb) { return copy_matrix(m, n, bytes, a, lda, b, ldb); }
COPIES(, int)
COPIES(Async, int)
COPIES(_64, int64_t)
COPIES(Async_64, int64_t)

RETURNS(cublasInit, CUBLAS_NOT_SUPPORTED)
RETURNS(cublasXtCreate, CUBLAS_NOT_SUPPORTED)
