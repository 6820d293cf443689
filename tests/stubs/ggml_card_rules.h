// The memory rules of ggml's CUDA backend (ggml-cuda.cu, fattn.cu, topk-moe.cu, mmq.cu of build
// b11434, default FA_QUANTS, CUB present) for compute capability 8.9: what it can compute, what a
// tensor takes, and what its pool needs.

#ifndef GGML_CARD_RULES_H
#define GGML_CARD_RULES_H

#include <algorithm>
#include <initializer_list>

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

#endif
