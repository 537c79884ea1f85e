//go:build !mutant_open_relay

package route

// relaysForOwnOnly says that only our own people send to other domains. The tag
// mutant_open_relay takes the guard out, and the tests must notice.
const relaysForOwnOnly = true
