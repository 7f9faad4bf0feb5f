// How Python tells C++ what went wrong. An exception that leaves a Python kernel reaches a
// stable-ABI caller, before torch 2.13, without its text; so the Python side hands the text over
// first and returns normally.
#pragma once
#include <string>

#define GAN_BINDING_API __attribute__((visibility("default")))

namespace gan {

GAN_BINDING_API void set_slow_path_error(const std::string& text);  // of this thread
std::string take_slow_path_error();                                 // and clears it; empty: none

}  // namespace gan
