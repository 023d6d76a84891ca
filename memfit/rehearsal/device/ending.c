/* A process that is ending ends with its own status, and without a word.

   Libraries keep threads. On a real device they have mostly ended when the process does. Here one can
   still be there, and then C++ calls std::terminate in the middle of an exit that has a status already.

   - While Python ends, a thread that asks for Python's lock is ended by pthread_exit. That unwinds the
     frames of C++ below it, such as those of autograd's thread of a device, and one of them may not be
     left so. Such a thread waits for the end of the process instead, as Python 3.14 has it do (gh-87135).
   - From exit() on, std::terminate leaves with the status. A program that returns from main() calls
     another exit(), so a handler does the same for it. */
#include "device.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static int exit_status;

static void leave(void) { _exit(exit_status); }

static void leave_on_terminate(int status, void *nothing UNUSED) {
    exit_status = status;
    /* std::set_terminate, where the process has libstdc++. */
    void *library = dlopen("libstdc++.so.6", RTLD_LAZY | RTLD_NOLOAD);
    void *(*set_terminate)(void (*)(void)) = NULL;
    if (library) *(void **)&set_terminate = dlsym(library, "_ZSt13set_terminatePFvvE");
    if (set_terminate) set_terminate(leave);
}

void end_quietly(void) { on_exit(leave_on_terminate, NULL); }

API __attribute__((noreturn)) void exit(int status) {
    leave_on_terminate(status, NULL);
    void (*real_exit)(int);
    *(void **)&real_exit = dlsym(RTLD_NEXT, "exit");
    if (real_exit) real_exit(status);
    _exit(status);
}

API __attribute__((noreturn)) void pthread_exit(void *value) {
    int (*is_python_ending)(void);
    *(void **)&is_python_ending = dlsym(RTLD_DEFAULT, "Py_IsFinalizing"); /* since Python 3.13 */
    if (!is_python_ending) *(void **)&is_python_ending = dlsym(RTLD_DEFAULT, "_Py_IsFinalizing");
    while (is_python_ending && is_python_ending()) pause();
    void (*real_exit)(void *);
    *(void **)&real_exit = dlsym(RTLD_NEXT, "pthread_exit");
    if (real_exit) real_exit(value);
    _exit(EXIT_FAILURE);
}
