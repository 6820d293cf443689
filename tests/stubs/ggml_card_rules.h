// The memory rules of ggml's CUDA backend (ggml-cuda.cu, fattn.cu, topk-moe.cu, mmq.cu of build
// b11434, default FA_QUANTS, CUB present) for compute capability 8.9: what it can compute, what a
// tensor takes, which tensors its fusions keep alive, and what its pool needs.

#ifndef GGML_CARD_RULES_H
#define GGML_CARD_RULES_H

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

inline bool card_is_one_of(int value, std::initializer_list<int> values) {
    for (int each : values) {
        if (each == value) {
            return true;
        }
    }
    return false;
}

inline bool card_is_float(ggml_type type) { return card_is_one_of(type, {GGML_TYPE_F32, GGML_TYPE_F16}); }

// --- flash attention

enum class FlashKernel { none, vector, matrix };

inline float card_op_float(const ggml_tensor * op, int index) {
    float value;
    memcpy(&value, op->op_params + index, sizeof value);
    return value;
}

inline FlashKernel card_flash_kernel(const ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    const int64_t head = k->ne[0], head_v = v->ne[0], ratio = q->ne[2] / k->ne[2];
    bool grouped = ratio >= 2 && mask && card_op_float(op, 1) == 0.0f && k->ne[1] % 256 == 0;
    for (const ggml_tensor * each : {q, k, v, mask}) {
        for (int i = 1; each && !ggml_is_quantized(each->type) && i < GGML_MAX_DIMS; i++) {
            grouped = grouped && each->nb[i] % 16 == 0;
        }
    }
    bool possible = false;
    switch (head) {
        case 40: case 64: case 72: case 80: case 96: case 112: case 128: case 256:
            possible = head_v == head;
            break;
        case 192: possible = head_v == 128 && grouped && ratio % 8 == 0; break;
        case 320: possible = head_v == 256 && grouped && ratio % 32 == 0; break;
        case 512: possible = head_v == 512 && grouped; break;
        case 576: possible = head_v == 512 && grouped; break;
    }
    for (const ggml_tensor * each : {k, v}) {
        possible = possible && card_is_one_of(each->type, {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16,
            GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0});
    }
    if (!possible || (mask && mask->ne[2] != 1)) {
        return FlashKernel::none;
    }
    const bool fits_vector = q->ne[0] <= 256 && q->ne[0] % 64 == 0 && q->ne[0] != 192 && k->ne[1] % 256 == 0;
    if (fits_vector) {
        const bool quantised = ggml_is_quantized(k->type) || ggml_is_quantized(v->type);
        const bool few_groups = !(ratio > 4 && (q->ne[0] >= 256 || k->ne[1] >= 8192));
        if (quantised ? q->ne[1] <= 2 : q->ne[1] == 1 && q->ne[3] == 1 && few_groups) {
            return FlashKernel::vector;
        }
        if (!grouped && q->ne[1] == 1) {
            return FlashKernel::vector;
        }
    }
    return FlashKernel::matrix;
}

// The kernels for matrices want f16; those for vectors do where no instance has these types.
inline size_t card_flash_alloc_size(const ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2];
    size_t end = ggml_nbytes(op);
    bool convert_k = false, convert_v = false;
    switch (card_flash_kernel(op)) {
        case FlashKernel::none: break;
        case FlashKernel::matrix: convert_k = convert_v = true; break;
        case FlashKernel::vector: {
            const auto as_stored = [](ggml_type type) { return type == GGML_TYPE_F32 ? GGML_TYPE_F16 : type; };
            const bool has_instance = card_is_one_of(q->ne[0], {64, 128, 256}) && as_stored(k->type) == as_stored(v->type) &&
                card_is_one_of(as_stored(k->type), {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0});
            convert_k = k->type == GGML_TYPE_F32 || !has_instance;
            convert_v = v->type == GGML_TYPE_F32 || !has_instance;
        }
    }
    const bool v_is_in_k = v->view_src && (v->view_src == k || (v->view_src == k->view_src && v->view_offs == k->view_offs));
    if (convert_k && k->type != GGML_TYPE_F16) {
        end = GGML_PAD(end, 128) + ggml_nelements(k) * 2;
    }
    if (convert_v && v->type != GGML_TYPE_F16 && !v_is_in_k) {
        end = GGML_PAD(end, 128) + ggml_nelements(v) * 2;
    }
    return end;
}

// --- sizes

inline size_t card_alloc_size(const ggml_tensor * tensor) {
    size_t size = tensor->op == GGML_OP_FLASH_ATTN_EXT ? card_flash_alloc_size(tensor) : ggml_nbytes(tensor);
    const int64_t odd = tensor->ne[0] % 512;
    if (ggml_is_quantized(tensor->type) && odd != 0) {
        size += ggml_row_size(tensor->type, 512 - odd);
    }
    return size;
}

// Rows of the batch: an operation with many runs here even where its weights are elsewhere.
inline int64_t card_batch(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_GET_ROWS: return 0;
        case GGML_OP_MUL_MAT: return op->ne[1];
        case GGML_OP_MUL_MAT_ID: case GGML_OP_ROPE: case GGML_OP_ROPE_BACK: return op->ne[2];
        default: return ggml_nrows(op);
    }
}

// What a graph takes from the pool at once: activations as q8_1 for quantised weights (36 bytes for 32
// values, and a tile), f16 copies for f16 ones.
inline size_t card_pool_bytes(const ggml_cgraph * graph) {
    size_t most = 0;
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor * op = graph->nodes[i];
        if ((op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) || card_batch(op) <= 8) {
            continue;
        }
        const ggml_tensor *weights = op->src[0], *input = op->src[1];
        const size_t rows = op->op == GGML_OP_MUL_MAT_ID ? op->src[2]->ne[0] * op->src[2]->ne[1] : ggml_nrows(input);
        if (ggml_is_quantized(weights->type)) {
            most = std::max<size_t>(most, rows * GGML_PAD(input->ne[0], 512) / 32 * 36 + 128 * 144);
        } else if (weights->type != GGML_TYPE_F32 && input->type == GGML_TYPE_F32) {
            most = std::max<size_t>(most, 2 * rows * (input->ne[0] + op->ne[0]));
        }
    }
    return most;
}

// --- what it can compute

inline bool card_has_mul_mat(const ggml_tensor * op) {
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    if (a->nb[0] != ggml_element_size(a) || b->nb[0] != ggml_element_size(b)) {
        return false;
    }
    const bool hadamard = op->op == GGML_OP_MUL_MAT && ggml_get_op_params_i32(op, 1) == GGML_HINT_SRC0_IS_HADAMARD &&
        a->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 && card_is_float(b->type) && ggml_is_contiguous(b) &&
        ggml_is_contiguous(op) && ggml_are_same_shape(b, op);
    if (b->type == GGML_TYPE_F16 && a->type != GGML_TYPE_F16 && !hadamard) {
        return false;
    }
    if (op->op == GGML_OP_MUL_MAT_ID && ggml_get_op_params_i32(op, 3) == GGML_PREC_F32) {
        return false;
    }
    return ggml_is_quantized(a->type) ? !card_is_one_of(a->type, {GGML_TYPE_TQ1_0, GGML_TYPE_TQ2_0, GGML_TYPE_Q8_1})
                                      : card_is_float(a->type) || a->type == GGML_TYPE_BF16;
}

inline bool card_has_get_rows(const ggml_tensor * op) {
    const ggml_tensor * from = op->src[0];
    if (card_is_one_of(from->type, {GGML_TYPE_IQ4_NL, GGML_TYPE_MXFP4})) {
        return from->ne[0] % 256 == 0;
    }
    return ggml_is_quantized(from->type)
        ? !card_is_one_of(from->type, {GGML_TYPE_TQ1_0, GGML_TYPE_TQ2_0, GGML_TYPE_Q8_1, GGML_TYPE_Q8_K, GGML_TYPE_NVFP4})
        : card_is_float(from->type) || card_is_one_of(from->type, {GGML_TYPE_BF16, GGML_TYPE_I32});
}

inline bool card_has_copy(const ggml_tensor * op) {
    const ggml_type from = op->src[0]->type, to = op->src[1]->type;
    const auto is_plain = [](ggml_type type) { return card_is_float(type) || type == GGML_TYPE_BF16; };
    const auto is_simple = [](ggml_type type) {
        return card_is_one_of(type, {GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0});
    };
    if (is_plain(from) && is_plain(to)) {
        return true;
    }
    if (from == GGML_TYPE_F32 && (is_simple(to) || card_is_one_of(to, {GGML_TYPE_IQ4_NL, GGML_TYPE_I32}))) {
        return true;
    }
    if (to == GGML_TYPE_F32 && (is_simple(from) || from == GGML_TYPE_I32)) {
        return true;
    }
    return from == to && (from == GGML_TYPE_I32 || (ggml_is_contiguous(op->src[0]) && ggml_is_contiguous(op->src[1])));
}

inline bool card_has_concat(const ggml_tensor * op) {
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    if (a->type != b->type || a->type != op->type) {
        return false;
    }
    if (!ggml_is_quantized(a->type)) {
        return ggml_blck_size(a->type) == 1;
    }
    const auto joins = [&](const ggml_tensor * each) {
        return ggml_get_op_params_i32(op, 0) == 3 ? ggml_is_contiguous(each) : ggml_is_contiguous_to_3(each);
    };
    return joins(a) && joins(b) && a->ne[0] % ggml_blck_size(a->type) == 0 && b->ne[0] % ggml_blck_size(a->type) == 0;
}

inline bool card_has_binary(const ggml_tensor * op) {
    const ggml_type a = op->src[0]->type, b = op->src[1]->type;
    if (a == GGML_TYPE_BF16 || b == GGML_TYPE_BF16 || op->type == GGML_TYPE_BF16) {
        return a == GGML_TYPE_BF16 && op->type == GGML_TYPE_BF16 && card_is_one_of(b, {GGML_TYPE_BF16, GGML_TYPE_F32});
    }
    return card_is_float(a) && card_is_float(b) && card_is_float(op->type);
}

inline bool card_has_scan(const ggml_tensor * op) {
    const ggml_tensor * state = op->src[0];
    if (op->src[3]->ne[0] == 1) { // Mamba 2
        return card_is_one_of(state->ne[0], {96, 128, 256}) && state->ne[1] % 16 == 0;
    }
    return ggml_get_op_params_i32(op, 0) <= 1 && state->ne[0] == 16 && state->ne[1] == 1 && state->ne[2] % 128 == 0 &&
        op->src[4]->ne[1] == 1;
}

inline bool card_supports(const ggml_tensor * op) {
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    switch (op->op) {
        case GGML_OP_UNARY:
            return ggml_get_unary_op(op) < GGML_UNARY_OP_COUNT && ggml_is_contiguous(a) &&
                !(a->type == GGML_TYPE_BF16 && ggml_get_unary_op(op) == GGML_UNARY_OP_XIELU);
        case GGML_OP_GLU:
            return ggml_is_contiguous_1(a) && !(a->type == GGML_TYPE_BF16 &&
                card_is_one_of(ggml_get_glu_op(op), {GGML_GLU_OP_SWIGLU_OAI, GGML_GLU_OP_SWIGLU_CLAMP}));
        case GGML_OP_MUL_MAT: case GGML_OP_MUL_MAT_ID: return card_has_mul_mat(op);
        case GGML_OP_OUT_PROD: return op->type == GGML_TYPE_F32 && a->type == GGML_TYPE_F32 && b->type == GGML_TYPE_F32;
        case GGML_OP_GET_ROWS: return card_has_get_rows(op);
        case GGML_OP_SET_ROWS:
            return card_is_one_of(b->type, {GGML_TYPE_I64, GGML_TYPE_I32}) &&
                ((a->type == GGML_TYPE_F16 && op->type == GGML_TYPE_F16) || (a->type == GGML_TYPE_F32 &&
                    card_is_one_of(op->type, {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,
                        GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL})));
        case GGML_OP_SET:
            return card_is_one_of(op->type, {GGML_TYPE_F32, GGML_TYPE_I32}) && op->type == a->type && op->type == b->type;
        case GGML_OP_CPY: return card_has_copy(op);
        case GGML_OP_REPEAT: return card_is_float(a->type);
        case GGML_OP_CONCAT: return card_has_concat(op);
        case GGML_OP_NORM: case GGML_OP_RMS_NORM: case GGML_OP_L2_NORM: case GGML_OP_SUM: return ggml_is_contiguous_rows(a);
        case GGML_OP_SCALE: return card_is_one_of(a->type, {GGML_TYPE_F32, GGML_TYPE_BF16}) && op->type == a->type;
        case GGML_OP_ADD: case GGML_OP_SUB: case GGML_OP_MUL: case GGML_OP_DIV: return card_has_binary(op);
        case GGML_OP_SSM_SCAN: return card_has_scan(op);
        case GGML_OP_SSM_CONV: return a->ne[1] % 128 == 0;
        case GGML_OP_ROPE: return a->nb[0] == ggml_type_size(a->type) && ggml_is_contiguous_2(a);
        case GGML_OP_IM2COL: case GGML_OP_IM2COL_3D: case GGML_OP_CONV_2D: case GGML_OP_ACC:
            return ggml_is_contiguous(a) && ggml_is_contiguous(b);
        case GGML_OP_CONV_2D_DW: return card_is_float(a->type) && b->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32;
        case GGML_OP_SUM_ROWS: case GGML_OP_MEAN:
            return a->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(a);
        case GGML_OP_ROLL: return a->type == GGML_TYPE_F32 && ggml_is_contiguous(a);
        case GGML_OP_GROUP_NORM: return ggml_is_contiguous(a);
        case GGML_OP_FLASH_ATTN_EXT: return card_flash_kernel(op) != FlashKernel::none;
        case GGML_OP_NONE: case GGML_OP_RESHAPE: case GGML_OP_VIEW: case GGML_OP_PERMUTE: case GGML_OP_TRANSPOSE:
        case GGML_OP_ADD_ID: case GGML_OP_ADD1: case GGML_OP_SQR: case GGML_OP_SQRT: case GGML_OP_SIN: case GGML_OP_COS:
        case GGML_OP_CLAMP: case GGML_OP_LOG: case GGML_OP_DUP: case GGML_OP_ARGMAX: case GGML_OP_COUNT_EQUAL:
        case GGML_OP_CONT: case GGML_OP_DIAG_MASK_INF: case GGML_OP_SOFT_MAX: case GGML_OP_POOL_1D: case GGML_OP_POOL_2D:
        case GGML_OP_TOP_K: case GGML_OP_ARGSORT: case GGML_OP_PAD: case GGML_OP_UPSCALE: case GGML_OP_PAD_REFLECT_1D:
        case GGML_OP_ARANGE: case GGML_OP_TIMESTEP_EMBEDDING: case GGML_OP_LEAKY_RELU: case GGML_OP_RWKV_WKV6:
        case GGML_OP_RWKV_WKV7: case GGML_OP_GATED_LINEAR_ATTN: case GGML_OP_GATED_DELTA_NET: case GGML_OP_FILL:
        case GGML_OP_CUMSUM: case GGML_OP_TRI: case GGML_OP_DIAG: case GGML_OP_SOLVE_TRI:
            return true;
        default: // training, and what only image and DeepSeek V3.2/V4 models do
            return false;
    }
}

// --- what its fusions keep alive

// Calls `keep` with every tensor that must outlive its last use, and until when.
template <typename Keep>
inline void card_keep_shared_experts(ggml_cgraph * graph, Keep keep) {
    const auto is_gated = [](const ggml_tensor * glu, const ggml_tensor * one, const ggml_tensor * other) {
        const ggml_tensor *gate = glu->src[0], *up = glu->src[1];
        return ((gate == one && up == other) || (gate == other && up == one)) &&
            gate->src[0]->type == up->src[0]->type && ggml_are_same_shape(gate->src[0], up->src[0]) &&
            ggml_are_same_stride(gate->src[0], up->src[0]) && gate->src[1] == up->src[1] && gate->src[2] == up->src[2] &&
            card_is_one_of(ggml_get_glu_op(glu), {GGML_GLU_OP_SWIGLU, GGML_GLU_OP_GEGLU, GGML_GLU_OP_SWIGLU_OAI,
                GGML_GLU_OP_SWIGLU_CLAMP}) && ggml_get_op_params_i32(glu, 1) == 0;
    };
    const auto matches = [&](int routed_at, int shared_at) {
        const int at[] = {routed_at, routed_at + 1, routed_at + 2, shared_at, shared_at + 1, shared_at + 2};
        const ggml_op ops[] = {GGML_OP_MUL_MAT_ID, GGML_OP_MUL_MAT_ID, GGML_OP_GLU, GGML_OP_MUL_MAT, GGML_OP_MUL_MAT, GGML_OP_GLU};
        const int outputs[] = {routed_at + 2, shared_at + 2};
        if (!ggml_can_fuse_subgraph_ext(graph, at, 6, ops, outputs, 2)) {
            return false;
        }
        const ggml_tensor *routed = graph->nodes[routed_at + 2], *shared = graph->nodes[shared_at + 2];
        if (!is_gated(routed, graph->nodes[routed_at], graph->nodes[routed_at + 1]) ||
            !is_gated(shared, graph->nodes[shared_at], graph->nodes[shared_at + 1])) {
            return false;
        }
        const ggml_tensor *weight = routed->src[1]->src[0], *input = routed->src[1]->src[1];
        const ggml_tensor *shared_weight = shared->src[1]->src[0], *shared_input = shared->src[1]->src[1];
        const ggml_tensor *shared_gate = shared->src[0]->src[0];
        return weight->buffer && ggml_is_quantized(weight->type) &&
            input->op == GGML_OP_RESHAPE && input->src[0] == shared_input && input->ne[1] == 1 && input->ne[3] == 1 &&
            ggml_is_contiguous(input) && ggml_is_contiguous(shared_input) && ggml_is_matrix(shared_input) &&
            weight->type == shared_weight->type && weight->ne[0] == shared_weight->ne[0] &&
            weight->ne[1] == shared_weight->ne[1] && weight->nb[1] == shared_weight->nb[1] && weight->ne[3] == 1 &&
            ggml_is_matrix(shared_weight) && ggml_is_contiguous(shared_weight) && ggml_is_contiguous(shared_gate) &&
            ggml_is_contiguous(routed) && ggml_is_contiguous(shared) && shared_weight->op == GGML_OP_NONE &&
            shared_gate->op == GGML_OP_NONE && ggml_get_glu_op(routed) == ggml_get_glu_op(shared) &&
            ggml_get_op_params_f32(routed, 3) == ggml_get_op_params_f32(shared, 3);
    };
    for (int i = 0; i + 5 < graph->n_nodes; i++) {
        if (graph->nodes[i]->op != GGML_OP_MUL_MAT_ID) {
            continue;
        }
        for (int j = i + 3; j + 2 < graph->n_nodes; j++) {
            if (graph->nodes[j]->op == GGML_OP_MUL_MAT_ID && graph->nodes[j + 1]->op == GGML_OP_MUL_MAT_ID) {
                break; // the next layer's
            }
            if (graph->nodes[j]->op != GGML_OP_MUL_MAT || !matches(i, j)) {
                continue;
            }
            // both experts are computed together, the shared one right after the routed ones
            std::rotate(graph->nodes + i + 3, graph->nodes + j, graph->nodes + j + 3);
            ggml_tensor * up = graph->nodes[i + 2]->src[1];
            keep(up->src[1], graph->nodes[i + 5]);
            keep(up->src[2], graph->nodes[i + 5]);
            i += 5;
            break;
        }
    }
}

struct WeightedSum {
    const ggml_tensor *experts = nullptr, *scale = nullptr, *weights = nullptr;
    ggml_tensor * sum = nullptr;
    int nodes = 0;
};

// experts [* scale] * weights, added up over 2 to 15 experts. False where it is none.
inline bool card_is_weighted_sum(const ggml_cgraph * graph, int at, WeightedSum & found) {
    const auto is_product = [](const ggml_tensor * op) {
        return op->op == GGML_OP_MUL && op->type == GGML_TYPE_F32 && ggml_is_contiguous(op);
    };
    const auto factors = [](const ggml_tensor * product, const ggml_tensor *& full, const ggml_tensor *& broadcast) {
        for (int i = 0; i < 2; i++) {
            const ggml_tensor *a = product->src[i], *b = product->src[1 - i];
            if (a && b && a->type == GGML_TYPE_F32 && ggml_is_contiguous(a) && ggml_are_same_shape(a, product) &&
                b->type == GGML_TYPE_F32 && ggml_is_contiguous(b) && b->ne[0] == 1 && b->ne[1] == product->ne[1] &&
                b->ne[2] == product->ne[2] && b->ne[3] == product->ne[3]) {
                full = a;
                broadcast = b;
                return true;
            }
        }
        return false;
    };
    const ggml_tensor *first = graph->nodes[at], *product = first, *scaled = nullptr;
    if (!is_product(first)) {
        return false;
    }
    int products = 1;
    if (at + 1 < graph->n_nodes && is_product(graph->nodes[at + 1]) &&
        factors(graph->nodes[at + 1], scaled, found.weights) && scaled == first && factors(first, found.experts, found.scale)) {
        product = graph->nodes[at + 1];
        products = 2;
    } else {
        found = WeightedSum{};
        if (!factors(first, found.experts, found.weights)) {
            return false;
        }
    }
    const int experts = static_cast<int>(product->ne[1]);
    const int64_t tokens = product->ne[2] * product->ne[3];
    found.nodes = 2 * experts + products - 1;
    if (experts < 2 || experts > 15 || at + found.nodes > graph->n_nodes) {
        return false;
    }
    std::vector<ggml_op> ops(products, GGML_OP_MUL);
    std::vector<const ggml_tensor *> views;
    const ggml_tensor * sum = nullptr;
    int sums = 0;
    for (int i = at + products; i < at + found.nodes; i++) {
        const ggml_tensor * op = graph->nodes[i];
        ops.push_back(op->op);
        if (op->type != GGML_TYPE_F32) {
            return false;
        }
        if (op->op == GGML_OP_VIEW) {
            if (static_cast<int>(views.size()) >= experts || op->src[0] != product || op->view_src != product ||
                op->ne[0] != product->ne[0] || op->ne[1] != tokens || op->ne[2] != 1 || op->ne[3] != 1 ||
                op->nb[0] != product->nb[0] || op->nb[1] != product->nb[2] || op->view_offs != views.size() * product->nb[1]) {
                return false;
            }
            views.push_back(op);
        } else if (op->op != GGML_OP_ADD || views.size() < 2 || sums + 1 >= static_cast<int>(views.size()) ||
                   op->src[0] != (sums == 0 ? views[0] : sum) || op->src[1] != views[sums + 1]) {
            return false;
        } else {
            sum = op;
            sums++;
        }
    }
    const int last = at + found.nodes - 1;
    if (static_cast<int>(views.size()) != experts || sums != experts - 1 || !ggml_is_contiguous(sum) ||
        sum->ne[0] != product->ne[0] || sum->ne[1] != tokens || sum->ne[2] != 1 || sum->ne[3] != 1 ||
        !ggml_can_fuse_subgraph(graph, at, found.nodes, ops.data(), &last, 1)) {
        return false;
    }
    found.sum = graph->nodes[last];
    return true;
}

// The choice of experts: gate [+ bias], the best, their weights [made 1 in sum] [scaled]. How many
// nodes it spans; 0 where it is none, or one whose softmax comes last (no memory is kept for those).
inline int card_router_nodes(const ggml_cgraph * graph, int at) {
    const auto is = [&](int i, ggml_op op) { return i < graph->n_nodes && graph->nodes[i]->op == op; };
    const auto follows = [&](int i, ggml_op op) { return is(i, op) && graph->nodes[i]->src[0] == graph->nodes[i - 1]; };
    const ggml_tensor * first = graph->nodes[at];
    std::vector<ggml_op> ops = {first->op};
    int i = at;
    if (first->op == GGML_OP_UNARY && ggml_get_unary_op(first) == GGML_UNARY_OP_SOFTPLUS && follows(i + 1, GGML_OP_SQRT)) {
        ops.push_back(GGML_OP_SQRT);
        i++;
    } else if (first->op != GGML_OP_SOFT_MAX &&
               !(first->op == GGML_OP_UNARY && ggml_get_unary_op(first) == GGML_UNARY_OP_SIGMOID)) {
        return 0;
    }
    const ggml_tensor * gates = graph->nodes[i];
    if (!follows(++i, GGML_OP_RESHAPE)) {
        return 0;
    }
    const ggml_tensor * reshaped = graph->nodes[i];
    ops.push_back(GGML_OP_RESHAPE);
    const ggml_tensor * ranked = gates;
    if (is(i + 1, GGML_OP_ADD) && graph->nodes[i + 1]->src[0] == gates) {
        ranked = graph->nodes[++i];
        ops.push_back(GGML_OP_ADD);
    }
    if (!is(++i, GGML_OP_ARGSORT) || graph->nodes[i]->src[0] != ranked || !follows(++i, GGML_OP_VIEW)) {
        return 0;
    }
    const int ids_at = i;
    if (!is(++i, GGML_OP_GET_ROWS) || graph->nodes[i]->src[0] != reshaped || graph->nodes[i]->src[1] != graph->nodes[ids_at]) {
        return 0;
    }
    ops.insert(ops.end(), {GGML_OP_ARGSORT, GGML_OP_VIEW, GGML_OP_GET_ROWS});
    if (follows(i + 1, GGML_OP_RESHAPE) && follows(i + 2, GGML_OP_SUM_ROWS) && follows(i + 3, GGML_OP_CLAMP) &&
        is(i + 4, GGML_OP_DIV) && graph->nodes[i + 4]->src[1] == graph->nodes[i + 3] &&
        graph->nodes[i + 4]->src[0] == graph->nodes[i + 1] && follows(i + 5, GGML_OP_RESHAPE)) {
        ops.insert(ops.end(), {GGML_OP_RESHAPE, GGML_OP_SUM_ROWS, GGML_OP_CLAMP, GGML_OP_DIV, GGML_OP_RESHAPE});
        i += 5;
    }
    if (follows(i + 1, GGML_OP_SCALE)) {
        ops.push_back(GGML_OP_SCALE);
        i++;
    }
    const int count = static_cast<int>(ops.size()), outputs[] = {ids_at, at + count - 1};
    const ggml_tensor *ids = graph->nodes[ids_at], *weights = graph->nodes[at + count - 1], *logits = first->src[0];
    const int experts = static_cast<int>(ids->nb[1] / ids->nb[0]);
    const bool has_kernel = ((experts & (experts - 1)) == 0 && experts <= 512) || experts == 288 || experts == 576;
    if (!has_kernel || !ggml_can_fuse_subgraph(graph, at, count, ops.data(), outputs, 2) || !ggml_is_contiguous(weights) ||
        !ggml_is_contiguous(logits)) {
        return 0;
    }
    if (first->op == GGML_OP_SOFT_MAX && (card_op_float(first, 0) != 1.0f || card_op_float(first, 1) != 0.0f ||
                                          first->src[1] || first->src[2])) {
        return 0;
    }
    return count;
}

// A fused operation writes its result while it still reads its inputs: they stay till its end.
inline void card_keep_fused(ggml_cgraph * graph, ggml_backend_graph_optimize_params * params) {
    static const bool disabled = getenv("GGML_CUDA_DISABLE_FUSION") && atoi(getenv("GGML_CUDA_DISABLE_FUSION"));
    if (disabled) {
        return;
    }
    const auto keep = [&](const ggml_tensor * tensor, ggml_tensor * until) {
        params->add_alloc_dep(params->user_data, const_cast<ggml_tensor *>(tensor), until);
    };
    card_keep_shared_experts(graph, keep);
    for (int i = 0; i < graph->n_nodes; i++) {
        WeightedSum sum;
        if (card_is_weighted_sum(graph, i, sum)) {
            keep(sum.experts, sum.sum);
            keep(sum.weights, sum.sum);
            if (sum.scale) {
                keep(sum.scale, sum.sum);
            }
            i += sum.nodes - 1;
        }
        const int count = card_router_nodes(graph, i);
        if (count == 0) {
            continue;
        }
        // until the node after it, as the CUDA backend has it
        const int end = i + count;
        for (; i < end; i++) {
            keep(graph->nodes[i], graph->nodes[end]);
            for (const ggml_tensor * source : graph->nodes[i]->src) {
                if (source) {
                    keep(source, graph->nodes[end]);
                }
            }
        }
        i--;
    }
}

#endif
