/* CUPTI, for torch.profiler: it may ask for activities of the device, and there are none. The real
   library would look for a driver's tables, which are not documented and not here.

   All that torch calls is here, texts of errors too: the real library looks for a driver at each
   of its functions. */
#include <time.h>

#include "libraries.h"

enum { CUPTI_NO_MORE_RECORDS = 12, CUPTI_NOT_SUPPORTED = 27 };

/* Source: cupti_version.h of CUDA 12.8 and 13. */
API Status cuptiGetVersion(uint32_t *version) {
    *version = cuda_version() >= 13000 ? (uint32_t)cuda_version() * 10 : 26;
    return OK;
}
API Status cuptiGetResultString(Status status, const char **text) {
    *text = status == OK ? "CUPTI_SUCCESS" : status == CUPTI_NO_MORE_RECORDS ? "CUPTI_ERROR_MAX_LIMIT_REACHED" : "CUPTI_ERROR_NOT_SUPPORTED";
    return OK;
}
API Status cuptiGetErrorMessage(Status status, const char **text) { return cuptiGetResultString(status, text); }
API Status cuptiGetCallbackName(int domain UNUSED, uint32_t callback UNUSED, const char **name) {
    *name = "unknown";
    return OK;
}

API Status cuptiSubscribe(void **subscriber, void *callback UNUSED, void *data UNUSED) {
    static int any;
    *subscriber = &any;
    return OK;
}
RETURNS(cuptiUnsubscribe, OK)
RETURNS(cuptiEnableCallback, OK)
RETURNS(cuptiEnableDomain, OK)
RETURNS(cuptiEnableAllDomains, OK)
RETURNS(cuptiFinalize, OK)

RETURNS(cuptiActivityEnable, OK)
RETURNS(cuptiActivityEnableContext, OK)
RETURNS(cuptiActivityEnableCudaEventDeviceTimestamps, OK)
RETURNS(cuptiActivityEnableDriverApi, OK)
RETURNS(cuptiActivityEnableHWTrace, CUPTI_NOT_SUPPORTED)
RETURNS(cuptiActivityEnableLatencyTimestamps, OK)
RETURNS(cuptiActivityEnableRuntimeApi, OK)
RETURNS(cuptiActivityDisable, OK)
RETURNS(cuptiActivityDisableContext, OK)
RETURNS(cuptiActivityFlush, OK)
RETURNS(cuptiActivityFlushAll, OK)
RETURNS(cuptiActivityFlushPeriod, OK)
RETURNS(cuptiActivityRegisterCallbacks, OK)
RETURNS(cuptiActivityRegisterTimestampCallback, OK)
RETURNS(cuptiActivitySetAttribute, OK)
RETURNS(cuptiActivityPushExternalCorrelationId, OK)
RETURNS(cuptiActivityGetNextRecord, CUPTI_NO_MORE_RECORDS)
API Status cuptiActivityPopExternalCorrelationId(int kind UNUSED, uint64_t *last) {
    if (last) *last = 0;
    return OK;
}
API Status cuptiActivityGetNumDroppedRecords(void *context UNUSED, uint32_t stream UNUSED, size_t *dropped) {
    *dropped = 0;
    return OK;
}
API Status cuptiGetTimestamp(uint64_t *nanoseconds) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    *nanoseconds = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    return OK;
}

/* Counters of the hardware. */
RETURNS(cuptiProfilerInitialize, CUPTI_NOT_SUPPORTED)
RETURNS(cuptiProfilerHostInitialize, CUPTI_NOT_SUPPORTED)
RETURNS(cuptiProfilerDeviceSupported, CUPTI_NOT_SUPPORTED)
RETURNS(cuptiDeviceGetChipName, CUPTI_NOT_SUPPORTED)
RETURNS(cuptiGetDeviceId, CUPTI_NOT_SUPPORTED)
RETURNS(cuptiGetContextId, CUPTI_NOT_SUPPORTED)
RETURNS(cuptiGetStreamId, CUPTI_NOT_SUPPORTED)
RETURNS(cuptiGetStreamIdEx, CUPTI_NOT_SUPPORTED)
RETURNS(cuptiGetGraphId, CUPTI_NOT_SUPPORTED)
RETURNS(cuptiGetGraphNodeId, CUPTI_NOT_SUPPORTED)
