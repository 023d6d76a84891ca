/* cuFFT and cuRAND, whose transforms and numbers do nothing. A plan is a number; its work area is
   left out (0), because cuFFT tells it only to a real device. Callbacks, several devices, and what
   else torch does not call, are refused. */
#include "libraries.h"

enum { CUFFT_NOT_IMPLEMENTED = 14, CURAND_NOT_SUPPORTED = 201 };
enum { MAX_PLANS = 1 << 16 };

static void *streams[MAX_PLANS];
static int num_plans;

static Status create_plan(int *plan) {
    device_lock();
    *plan = ++num_plans;
    device_unlock();
    return OK;
}
static Status execute(int plan) {
    count_launch(streams[plan % MAX_PLANS]);
    return OK;
}

API Status cufftCreate(int *plan) { return create_plan(plan); }
API Status cufftDestroy(int plan) {
    streams[plan % MAX_PLANS] = NULL;
    return OK;
}
API Status cufftSetStream(int plan, void *stream) {
    streams[plan % MAX_PLANS] = stream;
    return OK;
}
#define OF_PLAN(name, status) RETURNS(cufft##name, status)
OF_PLAN(SetAutoAllocation, OK) OF_PLAN(SetWorkArea, OK) OF_PLAN(XtSetWorkArea, OK) OF_PLAN(XtSetWorkAreaPolicy, OK)
OF_PLAN(SetPlanPropertyInt64, OK) OF_PLAN(ResetPlanProperty, OK)
#define RUN(name) API Status cufft##name(int plan) { return execute(plan); }
RUN(ExecC2C) RUN(ExecC2R) RUN(ExecD2Z) RUN(ExecR2C) RUN(ExecZ2D) RUN(ExecZ2Z) RUN(XtExec)
#define SIZE(name, k) ANSWERS_SIZE(cufft##name, k)
SIZE(MakePlan1d, 4) SIZE(MakePlan2d, 4) SIZE(MakePlan3d, 5) SIZE(MakePlanMany, 11) SIZE(MakePlanMany64, 11)
SIZE(XtMakePlanMany, 12) SIZE(GetSize, 1) SIZE(GetSize1d, 4) SIZE(GetSize2d, 4) SIZE(GetSize3d, 5) SIZE(GetSizeMany, 11)
SIZE(GetSizeMany64, 11) SIZE(XtGetSizeMany, 12)
#define PLAN(name) API Status cufft##name(int *plan) { return create_plan(plan); }
PLAN(Plan1d) PLAN(Plan2d) PLAN(Plan3d) PLAN(PlanMany)
#define NOT(name) RETURNS(cufft##name, CUFFT_NOT_IMPLEMENTED)
NOT(GetPlanPropertyInt64) NOT(XtClearCallback) NOT(XtExecDescriptor) NOT(XtExecDescriptorC2C) NOT(XtExecDescriptorC2R)
NOT(XtExecDescriptorD2Z) NOT(XtExecDescriptorR2C) NOT(XtExecDescriptorZ2D) NOT(XtExecDescriptorZ2Z) NOT(XtMakePlanGuru64)
NOT(XtMalloc) NOT(XtFree) NOT(XtMemcpy) NOT(XtQueryPlan) NOT(XtSetCallback) NOT(XtSetCallbackSharedSize) NOT(XtSetGPUs)
NOT(XtSetJITCallback) NOT(DeviceCreate)

API Status curandCreateGenerator(Handle **handle, int kind UNUSED) { return create_handle(handle); }
API Status curandDestroyGenerator(Handle *handle) { return destroy_handle(handle); }
API Status curandSetStream(Handle *handle, void *stream) { return set_stream(handle, stream); }
#define GENERATE(name) COMPUTES(curandGenerate##name)
GENERATE() GENERATE(LogNormal) GENERATE(LogNormalDouble) GENERATE(LongLong) GENERATE(Normal) GENERATE(NormalDouble)
GENERATE(Poisson) GENERATE(PoissonMethod) GENERATE(Seeds) GENERATE(Uniform) GENERATE(UniformDouble)
RETURNS(curandSetGeneratorOffset, OK)
RETURNS(curandSetGeneratorOrdering, OK)
RETURNS(curandSetPseudoRandomGeneratorSeed, OK)
RETURNS(curandSetQuasiRandomGeneratorDimensions, OK)
RETURNS(curandCreateGeneratorHost, CURAND_NOT_SUPPORTED)
RETURNS(curandCreatePoissonDistribution, CURAND_NOT_SUPPORTED)
