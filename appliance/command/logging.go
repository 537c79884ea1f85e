package command

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"sync"
	"time"
)

// lines is a writer that gathers log lines for a moment: two lines a message
// and a system call each would be a noticeable part of a message's cost. What
// is a warning or worse is written at once, with all before it.
type lines struct {
	mu    sync.Mutex
	w     *bufio.Writer
	timer *time.Timer
	armed bool
}

// linesDelay is the longest that a line stays in memory: what a kill may cost.
const linesDelay = 50 * time.Millisecond

func newLines(w io.Writer) *lines {
	l := &lines{w: bufio.NewWriterSize(w, 32<<10)}
	l.timer = time.AfterFunc(time.Hour, l.Flush)
	l.timer.Stop()
	return l
}

// Write implements io.Writer.
func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.armed {
		l.armed = true
		l.timer.Reset(linesDelay)
	}
	return l.w.Write(p)
}

// Flush writes what waits. An error of the log's own file has nobody to be told.
func (l *lines) Flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.armed = false
	l.w.Flush()
}

// prompt is a slog.Handler that flushes after what should be seen at once.
type prompt struct {
	slog.Handler
	l *lines
}

// Handle implements slog.Handler.
func (h prompt) Handle(ctx context.Context, r slog.Record) error {
	err := h.Handler.Handle(ctx, r)
	if r.Level >= slog.LevelWarn {
		h.l.Flush()
	}
	return err
}

// WithAttrs implements slog.Handler.
func (h prompt) WithAttrs(as []slog.Attr) slog.Handler { return prompt{h.Handler.WithAttrs(as), h.l} }

// WithGroup implements slog.Handler.
func (h prompt) WithGroup(name string) slog.Handler { return prompt{h.Handler.WithGroup(name), h.l} }
