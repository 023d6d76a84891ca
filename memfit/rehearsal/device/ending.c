/* A process that is ending ends with its own status, and without a word.
 *
 * Libraries of CUDA keep threads. On a real device they have ended when the destructors of the
 * process run. Here one can still be there, and C++ then calls std::terminate in the middle of an
 * exit that has a status already. So from the call of exit() on, std::terminate leaves with it.
 */
#include "device.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static int exit_status;

static void leave(void) { _exit(exit_status); }

API __attribute__((noreturn)) void exit(int status) {
  exit_status = status;
  /* std::set_terminate, where the process has libstdc++. */
  void *library = dlopen("libstdc++.so.6", RTLD_LAZY | RTLD_NOLOAD);
  void *(*set_terminate)(void (*)(void)) = NULL;
  if (library) *(void **)&set_terminate = dlsym(library, "_ZSt13set_terminatePFvvE");
  if (set_terminate) set_terminate(leave);
  void (*real_exit)(int);
  *(void **)&real_exit = dlsym(RTLD_NEXT, "exit");
  if (real_exit) real_exit(status);
  _exit(status);
}
