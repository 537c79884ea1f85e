package command

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestLogLinesWaitAMomentAndWarningsDoNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		l := newLines(&out)
		text := func() string { l.mu.Lock(); defer l.mu.Unlock(); return out.String() }
		log := slog.New(prompt{slog.NewJSONHandler(l, nil), l}).With("node", "plzen")
		log.Info("first")
		log.Info("second")
		if text() != "" {
			t.Fatalf("written at once: %s", text())
		}
		time.Sleep(linesDelay)
		synctest.Wait()
		if n := strings.Count(text(), "\n"); n != 2 {
			t.Fatalf("%d lines after %v", n, linesDelay)
		}
		log.Info("third")
		log.Warn("fourth")
		if n := strings.Count(text(), "\n"); n != 4 {
			t.Fatalf("%d lines after a warning", n)
		}
		log.Info("fifth")
		l.Flush()
		if !strings.HasSuffix(strings.TrimSpace(text()), `"msg":"fifth","node":"plzen"}`) {
			t.Fatalf("the last line is missing: %s", text())
		}
	})
}
