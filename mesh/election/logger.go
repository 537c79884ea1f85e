package election

import (
	"context"
	"io"
	"log"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// hclogger hands the libraries' logs to slog as debugging: a peer that cannot
// be dialled is their error and our Tuesday. What a person should know, this
// package says itself.
type hclogger struct {
	to   *slog.Logger
	name string
	args []any
}

func newHclog(to *slog.Logger) hclog.Logger { return &hclogger{to: to} }

func level(l hclog.Level) slog.Level {
	if l >= hclog.Warn {
		return slog.LevelDebug
	}
	return slog.LevelDebug - 4
}

func (h *hclogger) Log(l hclog.Level, msg string, args ...any) {
	for i, a := range args {
		if f, ok := a.(hclog.Format); ok && len(f) > 0 {
			args[i] = f[0]
		}
	}
	h.to.Log(context.Background(), level(l), msg, args...)
}

func (h *hclogger) Trace(msg string, args ...any) { h.Log(hclog.Trace, msg, args...) }
func (h *hclogger) Debug(msg string, args ...any) { h.Log(hclog.Debug, msg, args...) }
func (h *hclogger) Info(msg string, args ...any)  { h.Log(hclog.Info, msg, args...) }
func (h *hclogger) Warn(msg string, args ...any)  { h.Log(hclog.Warn, msg, args...) }
func (h *hclogger) Error(msg string, args ...any) { h.Log(hclog.Error, msg, args...) }

func (h *hclogger) enabled(l hclog.Level) bool { return h.to.Enabled(context.Background(), level(l)) }
func (h *hclogger) IsTrace() bool              { return h.enabled(hclog.Trace) }
func (h *hclogger) IsDebug() bool              { return h.enabled(hclog.Debug) }
func (h *hclogger) IsInfo() bool               { return h.enabled(hclog.Info) }
func (h *hclogger) IsWarn() bool               { return h.enabled(hclog.Warn) }
func (h *hclogger) IsError() bool              { return h.enabled(hclog.Error) }

func (h *hclogger) ImpliedArgs() []any { return h.args }
func (h *hclogger) With(args ...any) hclog.Logger {
	return &hclogger{h.to.With(args...), h.name, append(h.args[:len(h.args):len(h.args)], args...)}
}
func (h *hclogger) Name() string                        { return h.name }
func (h *hclogger) Named(name string) hclog.Logger      { return &hclogger{h.to, name, h.args} }
func (h *hclogger) ResetNamed(name string) hclog.Logger { return h.Named(name) }
func (h *hclogger) SetLevel(hclog.Level)                {}
func (h *hclogger) GetLevel() hclog.Level               { return hclog.NoLevel }

func (h *hclogger) StandardLogger(*hclog.StandardLoggerOptions) *log.Logger {
	return slog.NewLogLogger(h.to.Handler(), slog.LevelDebug)
}
func (h *hclogger) StandardWriter(*hclog.StandardLoggerOptions) io.Writer {
	return h.StandardLogger(nil).Writer()
}
