/* CUPTI, for torch.profiler: it may ask for activities of the device, and there are none. The real
   library would look for a driver's tables, which are not documented and not here.

   Versions and the names of errors and callbacks are the real library's. */
#include <time.h>

#include "libraries.h"

enum { CUPTI_NO_MORE_RECORDS = 12, CUPTI_NOT_SUPPORTED = 27 };

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
