// A card without a GPU: a backend of ggml that llama-server loads by GGML_BACKEND_PATH.
//
// It is named CUDA0, counts memory as the CUDA backend of the same llama.cpp does for compute
// capability 8.9 (ggml-cuda.cu, fattn.cu), says what CUDA says where it is full, keeps its memory in
// host RAM and lets the CPU backend compute. Which cards there are, what they have, and who uses them
// is in the files that nvml.c reads too (card.h). CUDA_VISIBLE_DEVICES and GGML_CUDA_NO_PINNED,
// GGML_OP_OFFLOAD_MIN_BATCH and GGML_CUDA_DISABLE_FUSION work as on the real one.

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

#include "card.h"
#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include "ggml_card_fusions.h"
#include "ggml_card_rules.h"

namespace {

constexpr size_t GRANULE = 2 << 20; // in which CUDA's pool grows

struct Device {
    int index;
    size_t total;
    std::string name, uuid, description, bus;
    bool is_open = false;      // the driver has taken its overhead
    size_t pool = 0;           // bytes; grows with the prompts, never shrinks
    std::mutex mutex = {};
};

bool no_data; // as the file said when the library was loaded

ggml_backend_reg_t card_reg();
ggml_backend_buffer_type_t buffer_type(const Device * device);
Device & of(ggml_backend_dev_t dev) { return *static_cast<Device *>(dev->context); }
Device & of(ggml_backend_buffer_type_t buft) { return of(buft->device); }

// --- what is taken, in the file that all processes share

// Takes `bytes` more (or gives them back), or takes nothing and is false where so many are not free.
bool take(Device & device, long long bytes) {
    card_file file;
    card_users users;
    card_read(&file, nullptr, nullptr);
    card_users_open(&users, file.linger_ms);
    size_t free = 0;
    for (int i = 0; i < file.count; i++) {
        if (device.uuid == file.cards[i].uuid) {
            free = file.cards[i].free;
        }
    }
    const bool fits = bytes <= 0 ||
        card_users_bytes(&users, device.uuid.c_str()) + bytes <= free;
    if (fits) {
        card_user * mine = nullptr;
        for (int i = 0; i < users.count; i++) {
            card_user & user = users.users[i];
            if (user.pid == getpid() && !user.gone_at_ms && device.uuid == user.uuid) {
                mine = &user;
            }
        }
        if (!mine && users.count < PROCESSES_MAX) {
            mine = &users.users[users.count++];
            *mine = card_user{getpid(), card_started(getpid()), 0, 0, {}};
            snprintf(mine->uuid, sizeof mine->uuid, "%s", device.uuid.c_str());
        }
        GGML_ASSERT(mine);
        mine->bytes += bytes;
        users.changed = 1;
    }
    card_users_close(&users);
    return fits;
}

[[noreturn]] void out_of_memory(const Device & device, const char * function, const char * statement) {
    GGML_LOG_ERROR("CUDA error: out of memory\n");
    GGML_LOG_ERROR("  current device: %d, in function %s at ggml-cuda.cu:1\n", device.index, function);
    GGML_LOG_ERROR("  %s\n", statement);
    usleep(200000); // another thread writes the log
    ggml_abort("ggml-cuda.cu", 1, "CUDA error");
}

// The first use of a card gives the process its context there.
void open_context(Device & device) {
    std::lock_guard<std::mutex> lock(device.mutex);
    if (device.is_open) {
        return;
    }
    card_file file;
    card_read(&file, nullptr, nullptr);
    if (!take(device, file.overhead)) {
        out_of_memory(device, "ggml_cuda_set_device", "cudaSetDevice(device)");
    }
    device.is_open = true;
}

void grow_pool(Device & device, size_t bytes) {
    std::lock_guard<std::mutex> lock(device.mutex);
    if (bytes <= device.pool) {
        return;
    }
    const size_t more = GGML_PAD(bytes - device.pool, GRANULE);
    if (!take(device, more)) {
        out_of_memory(device, "alloc", "cuMemCreate(&handle, reserve_size, &prop, 0)");
    }
    device.pool += more;
}

// --- buffers

struct Memory {
    Device & device;
    void * base;
    size_t size;
};

void * map(size_t size) {
    const int protection = no_data ? PROT_NONE : PROT_READ | PROT_WRITE;
    void * base = mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return base == MAP_FAILED ? nullptr : base;
}

void buffer_free(ggml_backend_buffer_t buffer) {
    auto * memory = static_cast<Memory *>(buffer->context);
    munmap(memory->base, memory->size);
    card_file file;
    card_read(&file, nullptr, nullptr);
    // weights and cache are freed by who ends, and a driver that is slow is so there too
    if (file.linger_ms == 0 || buffer->usage == GGML_BACKEND_BUFFER_USAGE_COMPUTE) {
        take(memory->device, -static_cast<long long>(memory->size));
    }
    delete memory;
}

void * buffer_base(ggml_backend_buffer_t buffer) { return static_cast<Memory *>(buffer->context)->base; }

void copy(void * to, const void * from, size_t size) {
    if (!no_data) {
        memcpy(to, from, size);
    }
}

void read(void * to, const void * from, size_t size) {
    if (no_data) {
        memset(to, 0, size);
    } else {
        memcpy(to, from, size);
    }
}

void buffer_memset(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    if (!no_data) {
        memset(static_cast<char *>(tensor->data) + offset, value, size);
    }
}

void buffer_set(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    copy(static_cast<char *>(tensor->data) + offset, data, size);
}

void buffer_get(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    read(data, static_cast<const char *>(tensor->data) + offset, size);
}

bool buffer_copy(ggml_backend_buffer_t buffer, const ggml_tensor * from, ggml_tensor * to) {
    if (from->buffer->buft != buffer->buft) {
        return false;
    }
    copy(to->data, from->data, ggml_nbytes(from));
    return true;
}

void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    if (!no_data && value != 0) {
        memset(buffer_base(buffer), value, buffer->size);
    } else if (!no_data) {
        madvise(buffer_base(buffer), buffer->size, MADV_DONTNEED); // zeros, and no page of them
    }
}

const ggml_backend_buffer_i BUFFER = {
    buffer_free, buffer_base, nullptr, buffer_memset, buffer_set, buffer_get,
    nullptr, nullptr, buffer_copy, buffer_clear, nullptr,
};

const char * buft_name(ggml_backend_buffer_type_t buft) { return of(buft).name.c_str(); }

// Its name stands in the message, as that of the function of ggml-cuda.cu does.
ggml_backend_buffer_t ggml_backend_cuda_buffer_type_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    Device & device = of(buft);
    open_context(device);
    if (!take(device, size)) {
        GGML_LOG_ERROR("%s: allocating %.2f MiB on device %d: cudaMalloc failed: out of memory\n",
                       __func__, size / 1024.0 / 1024.0, device.index);
        return nullptr;
    }
    void * base = map(size);
    GGML_ASSERT(base);
    return ggml_backend_buffer_init(buft, BUFFER, new Memory{device, base, size}, size);
}

size_t buft_alignment(ggml_backend_buffer_type_t) { return 128; }

size_t buft_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) { return card_alloc_size(tensor); }

const ggml_backend_buffer_type_i BUFFER_TYPE = {
    buft_name, ggml_backend_cuda_buffer_type_alloc_buffer, nullptr, buft_alignment, nullptr,
    buft_alloc_size, nullptr, nullptr,
};

ggml_backend_buffer_type_t cpu_buffer_type() {
    return ggml_backend_dev_buffer_type(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
}

const char * host_name(ggml_backend_buffer_type_t) { return "CUDA_Host"; }

// Pinned memory: ordinary memory here, by another name.
ggml_backend_buffer_t host_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    open_context(of(buft));
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(cpu_buffer_type(), size);
    if (buffer && !getenv("GGML_CUDA_NO_PINNED")) {
        buffer->buft = buft;
    }
    return buffer;
}

ggml_backend_buffer_type_t host_buffer_type(ggml_backend_dev_t dev) {
    static ggml_backend_buffer_type type = {
        {host_name, host_alloc, nullptr, cpu_buffer_type()->iface.get_alignment, nullptr,
         cpu_buffer_type()->iface.get_alloc_size, nullptr, cpu_buffer_type()->iface.is_host},
        dev, nullptr,
    };
    return &type;
}

// --- the stream: whatever is asked for has happened when the call returns

struct Stream {
    Device & device;
    ggml_backend_t cpu;
};

const char * stream_name(ggml_backend_t backend) { return static_cast<Stream *>(backend->context)->device.name.c_str(); }

void stream_free(ggml_backend_t backend) {
    auto * stream = static_cast<Stream *>(backend->context);
    ggml_backend_free(stream->cpu);
    delete stream;
    delete backend;
}

void stream_set(ggml_backend_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    copy(static_cast<char *>(tensor->data) + offset, data, size);
}

void stream_get(ggml_backend_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    read(data, static_cast<const char *>(tensor->data) + offset, size);
}

void stream_synchronize(ggml_backend_t) {}

ggml_status stream_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    auto * stream = static_cast<Stream *>(backend->context);
    card_file file;
    card_read(&file, nullptr, nullptr);
    grow_pool(stream->device, card_pool_bytes(graph) + file.work);
    return no_data ? GGML_STATUS_SUCCESS : ggml_backend_graph_compute(stream->cpu, graph);
}

void stream_event(ggml_backend_t, ggml_backend_event_t) {}

void stream_optimize(ggml_backend_t, ggml_cgraph * graph, ggml_backend_graph_optimize_params * params) {
    card_keep_fused(graph, params);
}

const ggml_backend_i STREAM = {
    stream_name, stream_free, stream_set, stream_get, nullptr, nullptr, nullptr, stream_synchronize,
    nullptr, nullptr, nullptr, nullptr, stream_compute, stream_event, stream_event, stream_optimize,
};

// --- the device

const char * device_name(ggml_backend_dev_t dev) { return of(dev).name.c_str(); }
const char * device_description(ggml_backend_dev_t dev) { return of(dev).description.c_str(); }
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }

void device_memory(ggml_backend_dev_t dev, size_t * free, size_t * total) {
    Device & device = of(dev);
    card_file file;
    card_users users;
    open_context(device);
    card_read(&file, nullptr, nullptr);
    card_users_open(&users, file.linger_ms);
    const size_t used = card_users_bytes(&users, device.uuid.c_str());
    card_users_close(&users);
    *free = 0;
    *total = device.total;
    for (int i = 0; i < file.count; i++) {
        if (device.uuid == file.cards[i].uuid && used < file.cards[i].free) {
            *free = file.cards[i].free - used;
        }
    }
}

void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    props->name = device_name(dev);
    props->description = device_description(dev);
    props->type = device_type(dev);
    props->device_id = of(dev).bus.c_str();
    device_memory(dev, &props->memory_free, &props->memory_total);
    props->caps = {true, getenv("GGML_CUDA_NO_PINNED") == nullptr, false, true, true};
}

ggml_backend_t device_stream(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = {0x63, 0x61, 0x72, 0x64, 0x20, 0x77, 0x69, 0x74, 0x68, 0x6f, 0x75, 0x74, 0x20, 0x67, 0x70, 0x75};
    Device & device = of(dev);
    open_context(device);
    ggml_backend_t cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    auto set_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu)), "ggml_backend_set_n_threads"));
    set_threads(cpu, 1); // threads that spin at barriers are slow where tests share the cores
    return new ggml_backend{&guid, STREAM, dev, new Stream{device, cpu}};
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t dev) { return buffer_type(&of(dev)); }

bool device_supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    for (const ggml_tensor * source : op->src) {
        if (source && source->buffer && source->buffer->buft->iface.get_name == buft_name &&
            source->buffer->buft->device != dev) {
            return false;
        }
    }
    return card_supports(op);
}

bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    return buft->iface.get_name == buft_name && buft->device == dev;
}

bool device_offloads(ggml_backend_dev_t, const ggml_tensor * op) {
    static const int batch = getenv("GGML_OP_OFFLOAD_MIN_BATCH") ? atoi(getenv("GGML_OP_OFFLOAD_MIN_BATCH")) : 32;
    return card_batch(op) >= batch;
}

ggml_backend_event_t event_new(ggml_backend_dev_t dev) { return new ggml_backend_event{dev, nullptr}; }
void event_free(ggml_backend_dev_t, ggml_backend_event_t event) { delete event; }
void event_wait(ggml_backend_dev_t, ggml_backend_event_t) {}

const ggml_backend_device_i DEVICE = {
    device_name, device_description, device_memory, device_type, device_props, device_stream,
    device_buffer_type, host_buffer_type, nullptr, device_supports_op, device_supports_buft,
    device_offloads, event_new, event_free, event_wait,
};

// --- the registry

// The cards of CUDA_VISIBLE_DEVICES, by index or UUID, up to the first that is none.
std::vector<card> visible(const card_file & file) {
    const std::vector<card> all(file.cards, file.cards + file.count);
    const char * asked = getenv("CUDA_VISIBLE_DEVICES");
    if (!asked) {
        return all;
    }
    std::vector<card> chosen;
    std::string rest = asked;
    while (!rest.empty()) {
        const std::string one = rest.substr(0, rest.find(','));
        rest.erase(0, one.size() + 1);
        const auto found = std::find_if(all.begin(), all.end(), [&](const card & each) {
            return one == std::to_string(&each - all.data()) ||
                (one.rfind("GPU-", 0) == 0 && std::string(each.uuid).rfind(one, 0) == 0);
        });
        if (found == all.end()) {
            break;
        }
        chosen.push_back(*found);
    }
    return chosen;
}

struct Registry {
    std::vector<Device *> devices;
    std::vector<ggml_backend_dev_t> handles;
    std::vector<ggml_backend_buffer_type_t> types;
};

Registry & registry() { return *static_cast<Registry *>(card_reg()->context); }

ggml_backend_buffer_type_t buffer_type(const Device * device) { return registry().types[device->index]; }

const char * reg_name(ggml_backend_reg_t) { return "CUDA"; }
size_t reg_count(ggml_backend_reg_t) { return registry().devices.size(); }
ggml_backend_dev_t reg_device(ggml_backend_reg_t, size_t index) { return registry().handles.at(index); }
void * reg_function(ggml_backend_reg_t, const char *) { return nullptr; }

ggml_backend_reg_t card_reg() {
    static ggml_backend_reg reg = {GGML_BACKEND_API_VERSION, {reg_name, reg_count, reg_device, reg_function}, nullptr};
    static std::once_flag once;
    std::call_once(once, [] {
        auto * made = new Registry;
        reg.context = made;
        card_file file;
        card_read(&file, nullptr, nullptr);
        no_data = file.no_data;
        for (const card & each : visible(file)) {
            const int index = static_cast<int>(made->devices.size());
            auto * device = new Device{index, each.total, "CUDA" + std::to_string(index), each.uuid, each.name,
                                       "0000:0" + std::to_string(index + 1) + ":00.0"};
            auto * handle = new ggml_backend_device{DEVICE, &reg, device};
            made->devices.push_back(device);
            made->handles.push_back(handle);
            made->types.push_back(new ggml_backend_buffer_type{BUFFER_TYPE, handle, nullptr});
        }
    });
    return &reg;
}

} // namespace

extern "C" ggml_backend_reg_t ggml_backend_init(void) { return card_reg(); }
