//go:build mutant_lane

package queue

const lanesWait = false
