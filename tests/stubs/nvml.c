/* A stand-in for libnvidia-ml.so.1, so that the real binding and the real daemon can be tested.
 *
 *     cc -shared -fPIC -o libnvidia-ml.so.1 nvml.c
 *
 * What it says is in the file that NVML_STUB names; it is read anew at every call:
 *
 *     driver 560.35.03
 *     epoch 1                                       another number: the driver was loaded anew
 *     card UUID TOTAL FREE USED UTILIZATION NAME    bytes; utilization -1: not supported
 *     mig NUMBER [UUID TOTAL FREE USED NAME]        that card is partitioned, and has this instance
 *     error FUNCTION CODE                           the function fails with this code
 *     delay FUNCTION MILLISECONDS                   the function takes so long
 *
 * No file: the driver is not loaded. Every call is appended to the file named by NVML_STUB_CALLS.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9 };
enum { CARDS_MAX = 8 };

typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned gpu, memory; } rates;

typedef struct {
    char uuid[96], name[96];
    unsigned long long total, free, used;
    int utilization;
} card;

static struct {
    char driver[80];
    int epoch, count;
    card cards[CARDS_MAX];
} now;

/* Instances of partitioned cards, read with `now`. Their handles are MIG_HANDLE and above. */
enum { MIG_HANDLE = 100 };
static struct {
    int count, parents[CARDS_MAX], partitioned[CARDS_MAX];
    card instances[CARDS_MAX];
} migs;

static int read_mig(const char *line)
{
    unsigned parent;
    card *next = &migs.instances[migs.count];
    int fields = sscanf(line, "mig %u %95s %llu %llu %llu %95[^\n]", &parent, next->uuid,
                        &next->total, &next->free, &next->used, next->name);
    if (fields < 1 || parent >= CARDS_MAX)
        return 0;
    migs.partitioned[parent] = 1;
    if (fields == 6 && migs.count < CARDS_MAX - 1)
        migs.parents[migs.count++] = (int)parent;
    return 1;
}

static int initialised_in = -1;  /* the epoch; -1: not initialised */

/* Read the file, take as long and fail as it says; the function's own answer follows. */
static int begin(const char *function)
{
    char line[512], name[128];
    int number, result = SUCCESS, delay_ms = 0;
    const char *path = getenv("NVML_STUB"), *calls = getenv("NVML_STUB_CALLS");
    FILE *file = calls ? fopen(calls, "a") : NULL;
    if (file) {
        fprintf(file, "%s\n", function);
        fclose(file);
    }
    memset(&now, 0, sizeof now);
    memset(&migs, 0, sizeof migs);
    file = path ? fopen(path, "r") : NULL;
    if (!file)
        return DRIVER_NOT_LOADED;
    while (fgets(line, sizeof line, file)) {
        card *next = &now.cards[now.count];
        if (now.count < CARDS_MAX &&
            sscanf(line, "card %95s %llu %llu %llu %d %95[^\n]", next->uuid, &next->total,
                   &next->free, &next->used, &next->utilization, next->name) == 6)
            now.count++;
        else if (sscanf(line, "error %127s %d", name, &number) == 2 && !strcmp(name, function))
            result = number;
        else if (sscanf(line, "delay %127s %d", name, &number) == 2 && !strcmp(name, function))
            delay_ms = number;
        else if (sscanf(line, "epoch %d", &number) == 1)
            now.epoch = number;
        else if (!read_mig(line))
            sscanf(line, "driver %79[^\n]", now.driver);
    }
    fclose(file);
    usleep(delay_ms * 1000u);
    if (result == SUCCESS && initialised_in != now.epoch && strcmp(function, "nvmlInitWithFlags"))
        return UNINITIALIZED;
    return result;
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
