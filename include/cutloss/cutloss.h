// cutloss: the loss of a large-vocabulary model, and its gradients, without the logits.
//
//   logits a[n,v] = logit_scale * dot(E[n], C[v]) + bias[v]
//          s      = softcap * tanh(a / softcap)            (s = a without a softcap)
//          z      = s / temperature[n]
//   nll[n] = lse[n] - z[n, target[n]],  lse[n] = log(sum_v exp(z[n,v]))
//
// The way of a call:  Problem (plain facts) -> make_plan -> the caller allocates -> forward,
// backward or forward_backward. Where the logits exist already (logits.h) there is no plan and
// nothing to allocate. Nothing here allocates memory in proportion to N, V or D (the matrix
// libraries have scratch memory of their own), depends on a framework or holds a global lock. Every
// function reports failure by throwing cutloss::Error, before it has written anything, except where
// an allocation inside a library fails.
//
// This header includes all others, and each of them can be included alone:
//   problem.h   what is to be computed, in plain facts
//   plan.h      which engine does it, how, and in how much memory
//   call.h      pointers, and the calls of a plan
//   rows.h      from targets and weights to the coefficients of a loss, and to the loss
//   logits.h    the calls for logits that exist
//   types.h, error.h, version.h
//
// Letters: N rows, V vocabulary, D hidden size (Wijmans et al. 2025, "Cut Your Losses in
// Large-Vocabulary Language Models"). docs/math.md derives every formula.
#pragma once

#include "cutloss/call.h"
#include "cutloss/error.h"
#include "cutloss/logits.h"
#include "cutloss/plan.h"
#include "cutloss/problem.h"
#include "cutloss/rows.h"
#include "cutloss/types.h"
#include "cutloss/version.h"
