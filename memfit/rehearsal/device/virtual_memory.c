/* Virtual memory: addresses, physical memory and the mapping between them, which is what torch's
   expandable segments are made of. Physical memory takes the device's budget when it is created and
   gives it back with the last mapping. Memory that is mapped twice has two contents. */
#include "memory.h"

#include <stdlib.h>
#include <string.h>

/* The beginning of CUmemAllocationProp, and its length. */
typedef struct {
    int type, handle_types, location_type, device;
    unsigned char rest[16];
} Properties;

typedef struct {
    Properties properties;
    size_t num_bytes;
    int device, references;
} Physical;

typedef struct {
    char *base;
    size_t num_bytes;
    Physical *physical;
} Mapping;
static Mapping *mappings;
static size_t num_mappings, room_mappings;

static void drop(Physical *physical) {
    if (--physical->references) return;
    refund(physical->device, physical->num_bytes);
    free(physical);
}

API Status cuMemGetAllocationGranularity(size_t *granularity, const void *properties UNUSED, int option UNUSED) {
    return *granularity = PAGE_BYTES, OK;
}
API Status cuMemAddressReserve(void **pointer, size_t num_bytes, size_t alignment UNUSED, void *hint UNUSED, uint64_t flags UNUSED) {
    if (is_forked()) return NOT_INITIALIZED;
    if (!num_bytes || num_bytes % PAGE_BYTES) return INVALID_VALUE;
    device_lock();
    *pointer = take_addresses(num_bytes, -1);
    device_unlock();
    return *pointer ? OK : OUT_OF_MEMORY;
}
API Status cuMemAddressFree(void *pointer, size_t num_bytes UNUSED) {
    device_lock();
    int is_done = give_addresses(pointer);
    device_unlock();
    return is_done ? OK : INVALID_VALUE;
}
API Status cuMemCreate(void **handle, size_t num_bytes, const Properties *properties, uint64_t flags UNUSED) {
    if (is_forked()) return NOT_INITIALIZED;
    int device = properties->device;
    if (properties->location_type != 1) return NOT_SUPPORTED; /* 1: a device */
    if (device < 0 || device >= card()->num_gpus) return INVALID_DEVICE;
    if (!num_bytes || num_bytes % PAGE_BYTES) return INVALID_VALUE;
    Physical *physical = calloc(1, sizeof *physical);
    if (!physical) return OUT_OF_MEMORY;
    *physical = (Physical){*properties, num_bytes, device, 1};
    device_lock();
    touch_device(device);
    Status status = charge(device, num_bytes);
    device_unlock();
    if (status) free(physical);
    else *handle = physical;
    return status;
}
API Status cuMemRelease(Physical *physical) {
    device_lock();
    drop(physical);
    device_unlock();
    return OK;
}
API Status cuMemMap(void *pointer, size_t num_bytes, size_t offset UNUSED, Physical *physical, uint64_t flags UNUSED) {
    char *base;
    Status status = OK;
    device_lock();
    size_t room = addresses_at(pointer, &base);
    if (!room || (char *)pointer + num_bytes > base + room || num_bytes > physical->num_bytes) status = INVALID_VALUE;
    else if (num_mappings == room_mappings) {
        size_t wanted = room_mappings ? 2 * room_mappings : 1024;
        Mapping *larger = realloc(mappings, wanted * sizeof *mappings);
        if (larger) {
            mappings = larger;
            room_mappings = wanted;
        } else status = OUT_OF_MEMORY;
    }
    if (!status) {
        physical->references++;
        mappings[num_mappings++] = (Mapping){pointer, num_bytes, physical};
        set_owner(pointer, num_bytes, physical->device);
    }
    device_unlock();
    return status;
}
API Status cuMemUnmap(void *pointer, size_t num_bytes) {
    char *from = pointer;
    Status status = INVALID_VALUE;
    device_lock();
    for (size_t i = num_mappings; i-- > 0;) {
        if (mappings[i].base < from || mappings[i].base >= from + num_bytes) continue;
        forget_contents(mappings[i].base, mappings[i].num_bytes);
        set_owner(mappings[i].base, mappings[i].num_bytes, -1);
        drop(mappings[i].physical);
        mappings[i] = mappings[--num_mappings];
        status = OK;
    }
    device_unlock();
    return status;
}
API Status cuMemSetAccess(void *pointer UNUSED, size_t num_bytes UNUSED, const void *access UNUSED, size_t n UNUSED) { return OK; }
API Status cuMemGetAccess(uint64_t *flags, const void *location UNUSED, void *pointer UNUSED) { return *flags = 3, OK; }
API Status cuMemGetAllocationPropertiesFromHandle(Properties *properties, const Physical *physical) {
    return *properties = physical->properties, OK;
}
API Status cuMemRetainAllocationHandle(Physical **handle, void *pointer) {
    Status status = INVALID_VALUE;
    device_lock();
    for (size_t i = 0; i < num_mappings && status; i++)
        if ((char *)pointer >= mappings[i].base && (char *)pointer < mappings[i].base + mappings[i].num_bytes) {
            *handle = mappings[i].physical;
            (*handle)->references++;
            status = OK;
        }
    device_unlock();
    return status;
}
/* The allocation around an address: a mapping is one. */
API Status cuMemGetAddressRange_v2(void **base, size_t *num_bytes, void *pointer) {
    char *at = 0;
    size_t room = 0;
    device_lock();
    for (size_t i = 0; i < num_mappings && !room; i++)
        if ((char *)pointer >= mappings[i].base && (char *)pointer < mappings[i].base + mappings[i].num_bytes) {
            at = mappings[i].base;
            room = mappings[i].num_bytes;
        }
    if (!room && !(room = small_room(pointer, &at))) room = addresses_at(pointer, &at);
    device_unlock();
    if (!room) return NOT_FOUND;
    if (base) *base = at;
    if (num_bytes) *num_bytes = room;
    return OK;
}
ALSO(cuMemGetAddressRange, cuMemGetAddressRange_v2);

/* Sharing with other processes and multicast have no meaning here. */
API Status cuMemExportToShareableHandle(void) { return NOT_SUPPORTED; }
API Status cuMemImportFromShareableHandle(void) { return NOT_SUPPORTED; }
API Status cuMulticastCreate(void) { return NOT_SUPPORTED; }
