//go:build mutant_overtake

package log

const heedsOrder = false
