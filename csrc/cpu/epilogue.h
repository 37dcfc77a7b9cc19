// What is done to an output while it is in registers: + bias, + residual, activation.
#pragma once

#include "op.h"
#include "vec.h"

namespace pk {
namespace PK_ISA {

// activation(y + bias + residual), or activation(y + bias) + residual where residual_last. Activations that are a
// clamp (none, relu, relu6, ...) are done in registers with low and high; any other one in a second pass over what was
// just stored (`late`), with `activate` of math.h.
struct Epilogue {
  const float* bias = nullptr;    // one per output channel, padded with zeros to whole vectors
  View residual;                  // of the output's shape
  bool residual_last = false;
  Act act = Act::none;
  float constants[3] = {0, 0, 0};
  float low = -__builtin_inff(), high = __builtin_inff();
  bool late = false;              // needs `activate`

  static Epilogue of(const Fields& f) {
    Epilogue e;
    e.bias = f.address<float>("bias");
    e.residual = f.view("residual");
    e.residual_last = f.integer("residual_last", 0) != 0;
    e.act = static_cast<Act>(f.integer("act", 0));
    e.constants[0] = float(f.number("act0", 0));
    e.constants[1] = float(f.number("act1", 0));
    e.constants[2] = float(f.number("act2", 0));
    switch (e.act) {
      case Act::none: break;
      case Act::relu: e.low = 0; break;
      case Act::clamp: e.low = e.constants[0]; e.high = e.constants[1]; break;
      case Act::clamp_min: e.low = e.constants[0]; break;
      case Act::clamp_max: e.high = e.constants[0]; break;
      default: e.late = true;
    }
    return e;
  }
};

}  // namespace PK_ISA
}  // namespace pk
