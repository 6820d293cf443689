/* A stand-in for libnvidia-ml.so.1, so that the real binding and the real daemon can be tested.
 *
 *     cc -shared -fPIC -o libnvidia-ml.so.1 nvml.c
 *
 * What it says is in the file that NVML_STUB names (card.h); it is read anew at every call. No file:
 * the driver is not loaded. Every call is appended to the file named by NVML_STUB_CALLS.
 */

#include "card.h"

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9 };

typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned gpu, memory; } rates;

static card_file now;
/* Instances of partitioned cards, read with `now`. Their handles are MIG_HANDLE and above. */
enum { MIG_HANDLE = 100 };
static struct {
    int count, parents[CARDS_MAX], partitioned[CARDS_MAX];
    card instances[CARDS_MAX];
} migs;

static void read_mig(const char *line)
{
    unsigned parent;
    card *next = &migs.instances[migs.count];
    int fields = sscanf(line, "mig %u %95s %llu %llu %llu %95[^\n]", &parent, next->uuid,
                        &next->total, &next->free, &next->used, next->name);
    if (fields < 1 || parent >= CARDS_MAX)
        return;
    migs.partitioned[parent] = 1;
    if (fields == 6 && migs.count < CARDS_MAX - 1)
        migs.parents[migs.count++] = (int)parent;
}

static int initialised_in = -1;  /* the epoch; -1: not initialised */

typedef struct {
    const char *function;
    int result, delay_ms;
} behaviour;

static void asked_for(const char *line, void *context)
{
    char name[128];
    int number;
    behaviour *asked = context;
    if (sscanf(line, "error %127s %d", name, &number) == 2 && !strcmp(name, asked->function))
        asked->result = number;
    else if (sscanf(line, "delay %127s %d", name, &number) == 2 && !strcmp(name, asked->function))
        asked->delay_ms = number;
    else
        read_mig(line);
}

/* Memory that processes use is not free; the reserved part, free + used less than total, stays. */
static void count_users(void)
{
    card_users users;
    card_users_open(&users, now.linger_ms);
    for (int i = 0; i < now.count; i++) {
        card *each = &now.cards[i];
        unsigned long long bytes = card_users_bytes(&users, each->uuid);
        unsigned long long taken = bytes < each->free ? bytes : each->free;
        each->free -= taken;
        each->used += taken;
    }
    card_users_close(&users);
}

/* Read the file, take as long and fail as it says; the function's own answer follows. */
static int begin(const char *function)
{
    behaviour asked = {function, SUCCESS, 0};
    const char *calls = getenv("NVML_STUB_CALLS");
    FILE *file = calls ? fopen(calls, "a") : NULL;
    if (file) {
        fprintf(file, "%s\n", function);
        fclose(file);
    }
    memset(&migs, 0, sizeof migs);
    if (!card_read(&now, asked_for, &asked))
        return DRIVER_NOT_LOADED;
    count_users();
    usleep(asked.delay_ms * 1000u);
    if (asked.result == SUCCESS && initialised_in != now.epoch && strcmp(function, "nvmlInitWithFlags"))
        return UNINITIALIZED;
    return asked.result;
}

/* A handle is the number of the card, from 1 on. */
static int begin_at(const char *function, void *handle, card **found)
{
    int result = begin(function);
    size_t number = (size_t)handle;
    if (result == SUCCESS && number >= MIG_HANDLE && number - MIG_HANDLE < (size_t)migs.count) {
        *found = &migs.instances[number - MIG_HANDLE];
        return SUCCESS;
    }
    if (result == SUCCESS && (number < 1 || number > (size_t)now.count))
        return INVALID_ARGUMENT;
    *found = &now.cards[number - 1];
    return result;
}

int nvmlInitWithFlags(unsigned flags)
{
    int result = begin(__func__);
    (void)flags;
    if (result == SUCCESS)
        initialised_in = now.epoch;
    return result;
}

int nvmlShutdown(void)
{
    int result = begin(__func__);
    initialised_in = -1;
    return result;
}

const char *nvmlErrorString(int result)
{
    (void)result;
    return "an error of the stub";
}

int nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    int result = begin(__func__);
    snprintf(version, length, "%s", now.driver);
    return result;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    int result = begin(__func__);
    *count = now.count;
    return result;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    int result = begin(__func__);
    if (result == SUCCESS && index >= (unsigned)now.count)
        return INVALID_ARGUMENT;
    *handle = (void *)(size_t)(index + 1);
    return result;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle)
{
    int result = begin(__func__);
    if (result != SUCCESS)
        return result;
    for (int i = 0; i < now.count; i++) {
        if (!strcmp(uuid, now.cards[i].uuid)) {
            *handle = (void *)(size_t)(i + 1);
            return SUCCESS;
        }
    }
    for (int i = 0; i < migs.count; i++) {
        if (!strcmp(uuid, migs.instances[i].uuid)) {
            *handle = (void *)(size_t)(MIG_HANDLE + i);
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetIndex(void *handle, unsigned *index)
{
    card *found;
    int result = begin_at(__func__, handle, &found);
    if (result == SUCCESS && (size_t)handle >= MIG_HANDLE)
        return NOT_SUPPORTED;
    *index = (unsigned)(size_t)handle - 1;
    return result;
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned length)
{
    card *found;
    int result = begin_at(__func__, handle, &found);
    if (result == SUCCESS)
        snprintf(uuid, length, "%s", found->uuid);
    return result;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned length)
{
    card *found;
    int result = begin_at(__func__, handle, &found);
    if (result == SUCCESS)
        snprintf(name, length, "%s", found->name);
    return result;
}

int nvmlDeviceGetMemoryInfo(void *handle, memory_v1 *memory)
{
    card *found;
    int result = begin_at(__func__, handle, &found);
    if (result == SUCCESS) {
        memory->total = found->total;
        memory->free = found->free;
        memory->used = found->used;
    }
    return result;
}

int nvmlDeviceGetMemoryInfo_v2(void *handle, memory_v2 *memory)
{
    card *found;
    int result = begin_at(__func__, handle, &found);
    if (result == SUCCESS) {
        memory->total = found->total;
        memory->free = found->free;
        memory->used = found->used;
        memory->reserved = found->total - found->free - found->used;
    }
    return result;
}

int nvmlDeviceGetUtilizationRates(void *handle, rates *used)
{
    card *found;
    int result = begin_at(__func__, handle, &found);
    if (result == SUCCESS && (found->utilization < 0 || (size_t)handle >= MIG_HANDLE))
        return NOT_SUPPORTED;
    if (result == SUCCESS)
        used->gpu = used->memory = (unsigned)found->utilization;
    return result;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending)
{
    card *found;
    int result = begin_at(__func__, handle, &found);
    if (result == SUCCESS && (size_t)handle >= MIG_HANDLE)
        return INVALID_ARGUMENT;
    if (result == SUCCESS)
        *current = *pending = (unsigned)migs.partitioned[found - now.cards];
    return result;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count)
{
    card *found;
    int result = begin_at(__func__, handle, &found);
    *count = CARDS_MAX;
    return result;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **mig)
{
    card *found;
    int result = begin_at(__func__, handle, &found);
    if (result != SUCCESS)
        return result;
    if (index >= (unsigned)migs.count || migs.parents[index] != found - now.cards)
        return NOT_FOUND;
    *mig = (void *)(size_t)(MIG_HANDLE + index);
    return SUCCESS;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *mig, void **handle)
{
    card *found;
    int result = begin_at(__func__, mig, &found);
    if (result == SUCCESS && (size_t)mig < MIG_HANDLE)
        return INVALID_ARGUMENT;
    if (result == SUCCESS)
        *handle = (void *)(size_t)(migs.parents[found - migs.instances] + 1);
    return result;
}
