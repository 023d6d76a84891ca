/* cuSPARSE, whose products do nothing. Descriptors of matrices and vectors are the real library's.

   What is left out: all workspaces are 0, and a product of two sparse matrices has no elements,
   because their number is only known to a kernel. A sum has as many as both together, the most
   that it can have. What torch does not call is refused. */
#include "libraries.h"

enum { CUSPARSE_NOT_SUPPORTED = 10 };

#define C(name) COMPUTES(cusparse##name)
#define CF(name) C(S##name) C(D##name) C(C##name) C(Z##name)
#define R(name) RETURNS(cusparse##name, CUSPARSE_NOT_SUPPORTED)
#define RF(name) R(S##name) R(D##name) R(C##name) R(Z##name)

CF(bsrmm) CF(bsrmv) CF(bsrsm2_analysis) CF(bsrsm2_solve) CF(bsrsv2_analysis) CF(bsrsv2_solve) CF(csrgeam2)
C(CreateIdentityPermutation) C(SDDMM) C(SDDMM_preprocess) C(SpMM) C(SpMV) C(SpSM_analysis)
C(SpSM_solve) C(SpSV_analysis) C(SpSV_solve) C(Xcoo2csr) C(XcoosortByRow) C(Xcsrsort)
C(SpGEMM_copy)

RF(bsr2csr) RF(bsric02) RF(bsric02_analysis) RF(bsric02_bufferSize) RF(bsrilu02) RF(bsrilu02_analysis)
RF(bsrilu02_bufferSize) RF(bsrilu02_numericBoost) RF(bsrxmv) RF(csr2bsr) RF(csr2csr_compress) RF(csr2csru)
RF(csr2gebsr) RF(csr2gebsr_bufferSize) RF(csrcolor) RF(csric02) RF(csric02_analysis)
RF(csric02_bufferSize) RF(csrilu02) RF(csrilu02_analysis) RF(csrilu02_bufferSize)
RF(csrilu02_numericBoost) RF(csru2csr) RF(csru2csr_bufferSizeExt) RF(gebsr2csr) RF(gebsr2gebsc)
RF(gebsr2gebsc_bufferSize) RF(gebsr2gebsr) RF(gebsr2gebsr_bufferSize) RF(gemvi) RF(gemvi_bufferSize)
RF(gpsvInterleavedBatch) RF(gpsvInterleavedBatch_bufferSizeExt) RF(gtsv2) RF(gtsv2StridedBatch)
RF(gtsv2StridedBatch_bufferSizeExt) RF(gtsv2_bufferSizeExt) RF(gtsv2_nopivot)
RF(gtsv2_nopivot_bufferSizeExt) RF(gtsvInterleavedBatch) RF(gtsvInterleavedBatch_bufferSizeExt) RF(nnz)
RF(nnz_compress)
R(Axpby) R(Csr2cscEx2) R(Csr2cscEx2_bufferSize) R(DenseToSparse_analysis)
R(DenseToSparse_bufferSize) R(DenseToSparse_convert) R(DpruneCsr2csr) R(DpruneCsr2csrByPercentage)
R(DpruneCsr2csrByPercentage_bufferSizeExt) R(DpruneCsr2csrNnz) R(DpruneCsr2csrNnzByPercentage)
R(DpruneCsr2csr_bufferSizeExt) R(DpruneDense2csr) R(DpruneDense2csrByPercentage)
R(DpruneDense2csrByPercentage_bufferSizeExt) R(DpruneDense2csrNnz) R(DpruneDense2csrNnzByPercentage)
R(DpruneDense2csr_bufferSizeExt) R(Gather) R(GetVersion)
R(HpruneCsr2csr) R(HpruneCsr2csrByPercentage) R(HpruneCsr2csrByPercentage_bufferSizeExt)
R(HpruneCsr2csrNnz) R(HpruneCsr2csrNnzByPercentage) R(HpruneCsr2csr_bufferSizeExt)
R(HpruneDense2csr) R(HpruneDense2csrByPercentage) R(HpruneDense2csrByPercentage_bufferSizeExt)
R(HpruneDense2csrNnz) R(HpruneDense2csrNnzByPercentage) R(HpruneDense2csr_bufferSizeExt) R(Rot)
R(Scatter) R(SpGEMM_estimateMemory) R(SpGEMMreuse_compute) R(SpGEMMreuse_copy) R(SpGEMMreuse_nnz)
R(SpGEMMreuse_workEstimation) R(SpMMOp_createPlan) R(SpMM_preprocess) R(SpMVOp) R(SpMVOp_bufferSize)
R(SpMVOp_createDescr) R(SpMVOp_createPlan) R(SpMVOp_setGlobalUserData) R(SpMV_preprocess)
R(SpSM_updateMatrix) R(SpSV_updateMatrix) R(SpVV) R(SpVV_bufferSize) R(SparseToDense)
R(SparseToDense_bufferSize) R(SpruneCsr2csr) R(SpruneCsr2csrByPercentage)
R(SpruneCsr2csrByPercentage_bufferSizeExt) R(SpruneCsr2csrNnz) R(SpruneCsr2csrNnzByPercentage)
R(SpruneCsr2csr_bufferSizeExt) R(SpruneDense2csr) R(SpruneDense2csrByPercentage)
R(SpruneDense2csrByPercentage_bufferSizeExt) R(SpruneDense2csrNnz) R(SpruneDense2csrNnzByPercentage)
R(SpruneDense2csr_bufferSizeExt) R(Xbsric02_zeroPivot) R(Xbsrilu02_zeroPivot) R(XcoosortByColumn)
R(Xcscsort) R(Xcscsort_bufferSizeExt) R(Xcsr2bsrNnz) R(Xcsr2coo) R(Xcsr2gebsrNnz)
R(Xcsric02_zeroPivot) R(Xcsrilu02_zeroPivot) R(Xgebsr2gebsrNnz)

API Status cusparseCreate(Handle **handle) { return create_handle(handle); }
API Status cusparseDestroy(Handle *handle) { return destroy_handle(handle); }
API Status cusparseSetStream(Handle *handle, void *stream) { return set_stream(handle, stream); }
API Status cusparseGetStream(const Handle *handle, void **stream) { return get_stream(handle, stream); }
API Status cusparseSetPointerMode(Handle *handle, int mode) { handle->pointer_mode = mode; return OK; }
API Status cusparseGetPointerMode(const Handle *handle, int *mode) { *mode = handle->pointer_mode; return OK; }

ANSWERS_SIZE(cusparseSDDMM_bufferSize, 10)
ANSWERS_SIZE(cusparseSpGEMM_workEstimation, 11)
ANSWERS_SIZE(cusparseSpGEMM_compute, 11)
ANSWERS_SIZE(cusparseSpMM_bufferSize, 10)
ANSWERS_SIZE(cusparseSpMV_bufferSize, 9)
ANSWERS_SIZE(cusparseSpSM_bufferSize, 10)
ANSWERS_SIZE(cusparseSpSV_bufferSize, 9)
ANSWERS_SIZE(cusparseXcoosort_bufferSizeExt, 6)
ANSWERS_SIZE(cusparseXcsrsort_bufferSizeExt, 6)
ANSWERS_INT(cusparseXbsrsm2_zeroPivot, 2)
ANSWERS_INT(cusparseXbsrsv2_zeroPivot, 2)
#define BUFFERS(type) \
    ANSWERS_INT(cusparse##type##bsrsm2_bufferSize, 13) ANSWERS_INT(cusparse##type##bsrsv2_bufferSize, 11) \
    ANSWERS_SIZE(cusparse##type##csrgeam2_bufferSizeExt, 19)
BUFFERS(S) BUFFERS(D) BUFFERS(C) BUFFERS(Z)

API Status cusparseXcsrgeam2Nnz(ARGUMENTS) {
    *(int *)a13 = (int)a4 + (int)a8; /* both matrices' */
    return OK;
}

/* cuSPARSELt (semi-structured sparsity): without its handle nothing else of it is reached. */
RETURNS(cusparseLtInit, CUSPARSE_NOT_SUPPORTED)
