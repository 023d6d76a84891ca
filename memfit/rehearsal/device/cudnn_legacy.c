/* cuDNN's functions that take a handle beside the graphs of operations: batch normalisation, pooling,
   activations, spatial transformers, CTC, dropout. Descriptors of tensors, filters, convolutions,
   pooling and activations stay the real library's.

   What is left out, because cuDNN documents no size and only tells it to a handle of a real device:

   | function                                        | size here | what it would be                 |
   | ----------------------------------------------- | --------- | -------------------------------- |
   | cudnnDropoutGetStatesSize                       | 0         | a few MiB, once for a device     |
   | batch normalisation, workspaces                 | 0         | 0 for NCHW; small for NHWC       |
   | batch normalisation, reserve                    | 0         | 0 without an activation in it    |
   | cudnnGetCTCLossWorkspaceSize, _v8               | 0         | two tables of log-probabilities  |
   | cudnnGetReductionWorkspaceSize, IndicesSize     | 0         | torch does not call them         |
   | recurrent layers                                | see cudnn_rnn.c                              |

   The first convolution API (cudnnFindConvolution..., cudnnGetConvolution..._v7) is refused. torch
   takes it with TORCH_CUDNN_V8_API_DISABLED=1 only. Likewise multi-head attention's first API. */
#include <stdlib.h>

#include "libraries.h"

enum { CUDNN_NOT_SUPPORTED = 3000 };
#define LEFT_OUT(name) RETURNS(name, CUDNN_NOT_SUPPORTED)

COMPUTES(cudnnActivationBackward) COMPUTES(cudnnActivationForward) COMPUTES(cudnnAddTensor)
COMPUTES(cudnnBatchNormalizationBackward) COMPUTES(cudnnBatchNormalizationBackwardEx)
COMPUTES(cudnnBatchNormalizationForwardInference) COMPUTES(cudnnBatchNormalizationForwardTraining)
COMPUTES(cudnnBatchNormalizationForwardTrainingEx) COMPUTES(cudnnConvolutionBackwardBias)
COMPUTES(cudnnConvolutionBackwardData) COMPUTES(cudnnConvolutionBackwardFilter)
COMPUTES(cudnnConvolutionBiasActivationForward) COMPUTES(cudnnConvolutionForward)
COMPUTES(cudnnCTCLoss) COMPUTES(cudnnCTCLoss_v8) COMPUTES(cudnnDivisiveNormalizationBackward)
COMPUTES(cudnnDivisiveNormalizationForward) COMPUTES(cudnnDropoutBackward)
COMPUTES(cudnnDropoutForward) COMPUTES(cudnnIm2Col) COMPUTES(cudnnLRNCrossChannelBackward)
COMPUTES(cudnnLRNCrossChannelForward) COMPUTES(cudnnNormalizationBackward)
COMPUTES(cudnnNormalizationForwardInference) COMPUTES(cudnnNormalizationForwardTraining)
COMPUTES(cudnnOpTensor) COMPUTES(cudnnPoolingBackward) COMPUTES(cudnnPoolingForward)
COMPUTES(cudnnReduceTensor) COMPUTES(cudnnReorderFilterAndBias) COMPUTES(cudnnScaleTensor)
COMPUTES(cudnnSetTensor) COMPUTES(cudnnSoftmaxBackward) COMPUTES(cudnnSoftmaxForward)
COMPUTES(cudnnSpatialTfGridGeneratorBackward) COMPUTES(cudnnSpatialTfGridGeneratorForward)
COMPUTES(cudnnSpatialTfSamplerBackward) COMPUTES(cudnnSpatialTfSamplerForward)
COMPUTES(cudnnTransformFilter) COMPUTES(cudnnTransformTensor) COMPUTES(cudnnTransformTensorEx)

/* The mode that torch takes for channels-last tensors: CUDNN_BATCHNORM_SPATIAL_PERSISTENT. */
enum { PERSISTENT = 2 };
#define BATCH_NORM_SIZE(name, k) \
    API Status name(ARGUMENTS) { \
        if ((int)a1 == PERSISTENT) leave_out(BATCH_NORM_WORKSPACE); \
        *(size_t *)a##k = 0; \
        return OK; \
    }
BATCH_NORM_SIZE(cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize, 8)
BATCH_NORM_SIZE(cudnnGetBatchNormalizationBackwardExWorkspaceSize, 10)
ANSWERS_SIZE(cudnnGetBatchNormalizationTrainingExReserveSpaceSize, 5)
ANSWERS_SIZE(cudnnGetNormalizationForwardTrainingWorkspaceSize, 10)
ANSWERS_SIZE(cudnnGetNormalizationBackwardWorkspaceSize, 12)
ANSWERS_SIZE(cudnnGetNormalizationTrainingReserveSpaceSize, 6)
LEAVES_OUT_SIZE(cudnnGetCTCLossWorkspaceSize, 8, CTC_WORKSPACE)
LEAVES_OUT_SIZE(cudnnGetCTCLossWorkspaceSize_v8, 5, CTC_WORKSPACE)
ANSWERS_SIZE(cudnnGetReductionIndicesSize, 4)
ANSWERS_SIZE(cudnnGetReductionWorkspaceSize, 4)
LEAVES_OUT_SIZE(cudnnDropoutGetStatesSize, 1, DROPOUT_STATES)

LEFT_OUT(cudnnFindConvolutionBackwardDataAlgorithm)
LEFT_OUT(cudnnFindConvolutionBackwardDataAlgorithmEx)
LEFT_OUT(cudnnFindConvolutionBackwardFilterAlgorithm)
LEFT_OUT(cudnnFindConvolutionBackwardFilterAlgorithmEx)
LEFT_OUT(cudnnFindConvolutionForwardAlgorithm) LEFT_OUT(cudnnFindConvolutionForwardAlgorithmEx)
LEFT_OUT(cudnnGetConvolutionBackwardDataAlgorithmMaxCount)
LEFT_OUT(cudnnGetConvolutionBackwardDataAlgorithm_v7)
LEFT_OUT(cudnnGetConvolutionBackwardDataWorkspaceSize)
LEFT_OUT(cudnnGetConvolutionBackwardFilterAlgorithmMaxCount)
LEFT_OUT(cudnnGetConvolutionBackwardFilterAlgorithm_v7)
LEFT_OUT(cudnnGetConvolutionBackwardFilterWorkspaceSize)
LEFT_OUT(cudnnGetConvolutionForwardAlgorithmMaxCount)
LEFT_OUT(cudnnGetConvolutionForwardAlgorithm_v7) LEFT_OUT(cudnnGetConvolutionForwardWorkspaceSize)
LEFT_OUT(cudnnGetFoldedConvBackwardDataDescriptors) LEFT_OUT(cudnnMakeFusedOpsPlan)
LEFT_OUT(cudnnFusedOpsExecute) LEFT_OUT(cudnnGetMultiHeadAttnBuffers)
LEFT_OUT(cudnnGetMultiHeadAttnWeights) LEFT_OUT(cudnnMultiHeadAttnForward)
LEFT_OUT(cudnnMultiHeadAttnBackwardData) LEFT_OUT(cudnnMultiHeadAttnBackwardWeights)

/* Descriptors whose settings no size depends on. Ours, because the real ones would be given a
   handle, and because they are in the largest of cuDNN's libraries. */
#define DESCRIPTOR(kind) \
    API Status cudnnCreate##kind(void **descriptor) { \
        *descriptor = calloc(1, sizeof(void *)); \
        return *descriptor ? OK : CUDNN_NOT_SUPPORTED; \
    } \
    API Status cudnnDestroy##kind(void *descriptor) { free(descriptor); return OK; }

DESCRIPTOR(CTCLossDescriptor)
DESCRIPTOR(DropoutDescriptor)
RETURNS(cudnnSetCTCLossDescriptor, OK)
RETURNS(cudnnSetCTCLossDescriptorEx, OK)
RETURNS(cudnnSetCTCLossDescriptor_v8, OK)
RETURNS(cudnnSetCTCLossDescriptor_v9, OK)
RETURNS(cudnnSetDropoutDescriptor, OK)
RETURNS(cudnnRestoreDropoutDescriptor, OK)
LEFT_OUT(cudnnGetDropoutDescriptor)
LEFT_OUT(cudnnGetCTCLossDescriptor)
LEFT_OUT(cudnnGetCTCLossDescriptorEx)
LEFT_OUT(cudnnGetCTCLossDescriptor_v8)
LEFT_OUT(cudnnGetCTCLossDescriptor_v9)
