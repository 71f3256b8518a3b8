#include "shades.h"

#include <algorithm>

#include "../check.h"

namespace finf {
namespace {

void shade(const uint8_t* from, int64_t count, const PixelRule& rule, int64_t phase, uint32_t* to) {
    kernels().delivery->shade_f32(from, count, rule, phase, reinterpret_cast<float*>(to));
}
void shade(const uint8_t* from, int64_t count, const PixelRule& rule, int64_t phase, uint16_t* to) {
    kernels().delivery->shade_bf16(from, count, rule, phase, reinterpret_cast<Bf16*>(to));
}

// The arithmetic of `count` channels taking turns.
PixelRule rule_of(const float* mean, const float* std, int64_t count) {
    PixelRule rule = {};
    rule.period = 16 * count;
    for (int64_t i = 0; i < PixelRule::SIZE; ++i) {
        const int64_t c = i % count;
        const double scale = 1.0 / 255.0, spread = 1.0 / static_cast<double>(std[c]);
        rule.gain[i] = static_cast<float>(scale * spread);
        rule.offset[i] = static_cast<float>(-static_cast<double>(mean[c]) * spread);
        rule.scale[i] = static_cast<float>(scale);
        rule.scale_rest[i] = static_cast<float>(scale - static_cast<double>(rule.scale[i]));
        rule.mean[i] = mean[c];
        rule.spread[i] = static_cast<float>(spread);
        rule.spread_rest[i] = static_cast<float>(spread - static_cast<double>(rule.spread[i]));
    }
    return rule;
}

// Whether the arithmetic gives what the tables have, to the bit, for every pixel there can be.
template <class Word>
bool agrees(const PixelRule& rule, const Word* tables) {
    uint8_t pixels[256 * PixelRule::MOST_CHANNELS];
    Word got[256 * PixelRule::MOST_CHANNELS];
    const int64_t channels = rule.period / 16, count = 256 * channels;
    for (int64_t i = 0; i < count; ++i) pixels[i] = static_cast<uint8_t>(i / channels);
    shade(pixels, count, rule, 0, got);
    for (int64_t i = 0; i < count; ++i) {
        if (got[i] != tables[256 * (i % channels) + i / channels]) return false;
    }
    return true;
}

}  // namespace

Shades::Shades(const void* tables, int64_t word, int64_t C, int64_t run, const float* mean, const float* std)
    : word_(word), C_(C), run_(run) {
    require_size("C", C, 1);
    require_size("run", run, 1);
    require(word == 2 || word == 4, "word", "2 or 4 bytes", word);
    require_memory("tables", tables, true);
    const uint8_t* const first = static_cast<const uint8_t*>(tables);
    tables_.assign(first, first + 256 * word * C);
    const bool turns = run == 1 && C <= PixelRule::MOST_CHANNELS;
    if (!mean || !std || (run == 1 && !turns)) return;
    word == 2 ? find_rules<uint16_t>(mean, std) : find_rules<uint32_t>(mean, std);
}

template <class Word>
void Shades::find_rules(const float* mean, const float* std) {
    const int64_t together = run_ == 1 ? C_ : 1;
    for (int64_t c = 0; c < C_; c += together) {
        rules_.push_back(rule_of(mean + c, std + c, together));
        const auto right = [&](PixelRule::Way way) {
            rules_.back().way = way;
            return agrees(rules_.back(), reinterpret_cast<const Word*>(tables_.data()) + 256 * c);
        };
        const bool in_pairs = sizeof(Word) == 2 && right(PixelRule::PAIRS);
        if (in_pairs || right(PixelRule::ONE_STEP) || right(PixelRule::EXACT)) continue;
        rules_.clear();
        return;
    }
}

template <class Word>
void Shades::apply_one(const uint8_t* from, int64_t count, int64_t c, Word* to) const {
    if (!rules_.empty()) return shade(from, count, rules_[static_cast<size_t>(c)], 0, to);
    const Word* const table = reinterpret_cast<const Word*>(tables_.data()) + 256 * c;
    for (int64_t i = 0; i < count; ++i) to[i] = table[from[i]];
}

template <class Word>
void Shades::apply(const uint8_t* from, int64_t count, int64_t place, Word* to) const {
    const int64_t phase = place % round();
    if (run_ == 1 && !rules_.empty()) return shade(from, count, rules_[0], phase, to);
    int64_t c = phase / run_, left = run_ - phase % run_;
    for (int64_t i = 0; i < count; left = run_, c = c + 1 < C_ ? c + 1 : 0) {
        const int64_t here = std::min(count - i, left);
        apply_one(from + i, here, c, to + i);
        i += here;
    }
}

template void Shades::apply(const uint8_t*, int64_t, int64_t, uint16_t*) const;
template void Shades::apply(const uint8_t*, int64_t, int64_t, uint32_t*) const;

}  // namespace finf
