// Which tensors the fusions of ggml's CUDA backend keep alive for longer than a graph needs them
// (its `graph_optimize`, build b11434): that makes the compute buffer of models with experts larger.

#ifndef GGML_CARD_FUSIONS_H
#define GGML_CARD_FUSIONS_H

#include <algorithm>
#include <vector>

#include "ggml_card_rules.h"

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
