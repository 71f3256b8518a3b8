// All loops of an instruction set, and the table of them. Included inside its namespace, last.
#pragma once

#include "activation_delta.inl.h"
#include "attention_delta.inl.h"
#include "cross_entropy_delta.inl.h"
#include "delivery.inl.h"
#include "fma_peak.inl.h"
#include "gemm_panel.inl.h"
#include "linear_cross_entropy_delta.inl.h"
#include "noise.inl.h"
#include "normalize.inl.h"
#include "squared_error_delta.inl.h"
#include "topk_merge.inl.h"

// Half: how bfloat16 results of activations and norms are rounded.
template <class Half>
constexpr finf::Kernels kernels_of(const char* name) {
    return {name,
            CROSS_ENTROPY_DELTA,
            NORM_ROWS<Half>,
            ACTIVATE<Half>,
            &SQUARED_ERROR_DELTA,
            ATTENTION_DELTA,
            &HEAD,
            &PANELS,
            nullptr,
            flops_of_fma,
            noise_row,
            &DELIVERY,
            &TOPK_MERGE};
}
