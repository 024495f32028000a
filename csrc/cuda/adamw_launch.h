// The parts of a step on CUDA, as the far pipeline (adamw_far.cu) needs them one by one.
#pragma once

#include "fastpeft/adamw.h"

namespace fastpeft::cuda {

// Of a staged list.
void adamw_far_step(const AdamWStepArgs& args, const Context& context);

// Brings the table up to date, counts the step and works out its factors.
void adamw_prepare(const AdamWStepArgs& args, const Context& context);

// Updates rows [first_row, first_row + rows) of the table.
void adamw_update_rows(const AdamWStepArgs& args, int64_t first_row, int64_t rows, const Context& context);

}  // namespace fastpeft::cuda
