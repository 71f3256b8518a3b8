// The look for scores that may enter a list: a plain loop, which the compiler turns into vectors of the set.
#pragma once

// How many whole glances of scores can be passed over, in scores: none of those reaches `worst`. A NaN reaches nothing.
template <class T>
int64_t passed_over(const T* scores, int64_t count, T worst) {
    int64_t s = 0;
    for (; s + finf::GLANCE <= count; s += finf::GLANCE) {
        int reached = 0;
        for (int64_t k = 0; k < finf::GLANCE; ++k) reached |= scores[s + k] >= worst;
        if (reached) break;
    }
    return s;
}

const finf::TopKLoops TOPK_MERGE = {passed_over<float>, passed_over<double>};
